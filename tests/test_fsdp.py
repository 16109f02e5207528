"""FSDP2 around fused weights: training, and what cannot be done to a sharded weight."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tritonparam as tp
from tests.test_torch_around import _free_port


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tp.register_parametrization(model[1], "weight", tp.Skew(), tp.CayleyMap())
    tp.weight_norm(model[3])
    return model


def _train(model: nn.Module, xs: list[torch.Tensor], cached: bool = False) -> None:
    """Gradients are the mean over all of xs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        if cached:
            with tp.cached(model):
                torch.stack([model(x).square().sum() for x in xs]).mean().backward()
        else:
            torch.stack([model(x).square().sum() for x in xs]).mean().backward()
        optimizer.step()


def _worker(rank: int, port: int, errors) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        mesh = init_device_mesh("cpu", (2,))
        xs = [torch.full((1, 4), float(i + 1)) for i in range(2)]
        reference = _model()
        _train(reference, xs)
        for cached in (False, True):
            model = _model()
            for layer in (model[1], model[3]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            tp.stats(reset=True)
            _train(model, xs[rank : rank + 1], cached)
            assert tp.stats() == {"kernel": 0, "closed": 6, "composed": 0}
            for x, y in zip(model.parameters(), reference.parameters(), strict=True):
                assert torch.allclose(x.full_tensor(), y, atol=1e-5)
        _check_refusals(model[1], reference[1].weight)
    except BaseException as error:
        errors[rank] = repr(error)
        raise
    finally:
        torch.distributed.destroy_process_group()


def _check_refusals(layer: nn.Module, weight: torch.Tensor) -> None:
    layer.reshard()
    before = deepcopy(list(layer.state_dict()))
    with pytest.raises(RuntimeError, match=r"read while its original is sharded .*unshard\(\)"):
        layer.weight
    with pytest.raises(ValueError, match=r"assignment: the tensor must be whole"):
        layer.weight = torch.eye(6)
    with pytest.raises(ValueError, match=r"remove_parametrizations: the tensor must be whole"):
        tp.remove_parametrizations(layer, "weight")
    with pytest.raises(ValueError, match=r"register_parametrization: .*before fully_shard\(\)"):
        tp.register_parametrization(layer, "bias", tp.Pruning(torch.ones(6)))
    assert tp.explain(layer)[0].reason == "the original is a DTensor, a tensor subclass"
    assert list(layer.state_dict()) == before
    layer.unshard()
    assert torch.allclose(layer.weight, weight, atol=1e-5)
    layer.reshard()
    layer(torch.ones(1, 6))


def test_fsdp():
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        errors = manager.dict()
        torch.multiprocessing.spawn(_worker, (_free_port(), errors), nprocs=2)
        assert not errors
