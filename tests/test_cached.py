"""``cached()``: once per block and thread, and never stale."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

import tritonparam as tp


@pytest.fixture
def layer():
    return tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())


def reads(layer: nn.Module) -> int:
    """How many evaluations one more read costs."""
    tp.stats(reset=True)
    layer.weight
    return sum(tp.stats().values())


def test_once_per_block(layer):
    assert reads(layer) == reads(layer) == 1
    with tp.cached():
        assert reads(layer) == 1
        assert reads(layer) == 0
        with tp.cached():
            assert reads(layer) == 0
        assert reads(layer) == 0
    assert reads(layer) == 1


def test_composed_chains_too():
    layer = tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew())
    with tp.cached():
        assert [reads(layer), reads(layer)] == [1, 0]


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_seen(layer, fused):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
    with tp.cached():
        layer.weight[0, 1].backward()
        assert reads(layer) == 0
        optimizer.step()
        assert reads(layer) == 1


def test_assignment_load_and_conversion_are_seen(layer):
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with tp.cached():
        first = layer.weight
        layer.weight = q
        assert torch.allclose(layer.weight, q, atol=1e-5)
        layer.load_state_dict(state)
        assert torch.equal(layer.weight, first)
        assert layer.double().weight.dtype == torch.float64
        layer.eval()
        assert reads(layer) == 1
        layer.parametrizations.weight[1].signature.neg_()
        assert reads(layer) == 1
        with tp.use_path("composed"):
            assert reads(layer) == 1


def test_a_read_without_gradients_does_not_poison_a_later_one(layer):
    with tp.cached():
        with torch.no_grad():
            assert not layer.weight.requires_grad
        layer.weight.sum().backward()
        assert layer.parametrizations.weight.original.grad is not None
        with torch.inference_mode():
            layer.weight
        assert layer.weight.requires_grad


def test_two_backwards_give_torchs_error(layer):
    with tp.cached():
        layer.weight.square().sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            layer.weight.square().sum().backward()


def test_threads_do_not_share(layer):
    seen = []
    with tp.cached():
        reads(layer)
        thread = threading.Thread(target=lambda: seen.extend([reads(layer), reads(layer)]))
        thread.start()
        thread.join()
    assert seen == [1, 1]


def test_freed_modules_never_match():
    with tp.cached():
        for i in range(20):
            layer = tp.register_parametrization(
                nn.Linear(2, 2), "weight", tp.Skew(), tp.CayleyMap()
            )
            with torch.no_grad():
                layer.parametrizations.weight.original.fill_(float(i))
            assert torch.allclose(
                layer.weight, tp.CayleyMap()(tp.Skew()(torch.full((2, 2), float(i))))
            )
            del layer
            gc.collect()


def test_the_block_ends_after_an_error(layer):
    with pytest.raises(ZeroDivisionError), tp.cached():
        layer.weight / (1 // 0)
    assert reads(layer) == reads(layer) == 1


def test_transforms_are_not_cached(layer):
    def loss(original):
        state = {"parametrizations.weight.original": original}
        return torch.func.functional_call(layer, state, (torch.ones(1, 4),)).sum()

    original = layer.parametrizations.weight.original.detach()
    expected = torch.func.grad(loss)(original)
    with tp.cached():
        layer.weight
        assert torch.allclose(torch.func.grad(loss)(original), expected)
        assert reads(layer) == 0
