"""An optimizer's step by Triton kernels: all layers of a kind in the launches of one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import tritonparam as tp
from tests.test_stepped import original
from tritonparam import stepped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layers_of_kinds() -> nn.ModuleList:
    """Layers of two dtypes and numbers of iterations, and a vector."""
    torch.manual_seed(5)
    layers = [nn.Linear(5, 4), nn.ConvTranspose2d(3, 4, 2), nn.Linear(7, 9)]
    model = [tp.spectral_norm(layer, iterate="step") for layer in layers]
    model.append(tp.spectral_norm(nn.Linear(6, 6), iterate="step", n_power_iterations=3))
    model.append(tp.spectral_norm(nn.Linear(4, 5).bfloat16(), iterate="step"))
    model.append(tp.spectral_norm(nn.Linear(3, 2), "bias", iterate="step"))
    return nn.ModuleList(model).to(DEVICE)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many weights each call of the kernels' launcher advances."""
    kernels = pytest.importorskip("tritonparam.kernels.power_iteration")
    found = []

    def counting(ws, *args, advance=kernels.advance):
        found.append(len(ws))
        advance(ws, *args)

    monkeypatch.setattr(kernels, "advance", counting)
    return found


def step(model: nn.Module) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = p.detach().cos()
    optimizer.step()
    return [b.clone() for b in model.buffers()]


def test_kernels_advance_all_layers_of_a_kind_at_once(calls):
    model = layers_of_kinds()
    versions = [b._version for b in model.buffers()]
    alone = deepcopy(model)
    with tp.use_path("closed"):
        expected = step(alone)
    assert not calls
    with tp.use_path("kernel"):
        got = step(model)
    assert sorted(calls) == [1, 1, 3]
    for mine, other in zip(got, expected, strict=True):
        # In bf16 numbers up to 1, rounded from two that may lie on both sides of a tie.
        atol = 1e-6 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps / 2
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=atol)
    assert all(b._version > old for b, old in zip(model.buffers(), versions, strict=True))


def test_kernels_of_vectors_that_do_not_fit_are_not_launched(calls):
    layer = tp.spectral_norm(nn.Linear(5, 4), iterate="step").to(DEVICE)
    link = layer.parametrizations.weight[0]
    link._v = link._v.double()  # torch casts it
    expected = deepcopy(link)
    stepped.advance(expected, original(layer))
    with tp.use_path("kernel"):
        stepped.advance_all([(link, original(layer))])
    assert not calls
    assert torch.equal(link._v, expected._v)


def test_a_kernel_that_does_not_compile_leaves_the_step_to_torch(monkeypatch):
    kernels = pytest.importorskip("tritonparam.kernels.power_iteration")
    from triton.runtime.errors import OutOfResources

    class Failing:
        arg_names = ()

        def __getitem__(self, grid):
            raise OutOfResources(300_000, 232_448, "shared memory")

    model = layers_of_kinds()
    alone = deepcopy(model)
    with tp.use_path("closed"):
        expected = step(alone)
    monkeypatch.setattr(kernels, "vectors_kernel", Failing())
    monkeypatch.setattr(tp.paths, "device_declines", lambda x: "")
    monkeypatch.setattr(tp.failures, "_causes", {})
    monkeypatch.setattr(tp.failures, "_warned", set())
    with pytest.warns(UserWarning, match="spectral_norm: Triton cannot compile"):
        got = step(model)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)
