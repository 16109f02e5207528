"""Links declared to equal ours: fused where they do, an error where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonparam as tp
from tests.test_fuse import MyCayley, MySkew, by_torch, evaluated


def test_alias_is_checked_and_fused():
    layer = by_torch(nn.Linear(5, 5), MySkew(), MyCayley(5))
    state = torch.random.get_rng_state()
    tp.fuse(layer)
    assert evaluated(layer) == {"composed": 1}
    tp.unfuse(layer)
    tp.alias(MySkew, tp.Skew)
    tp.alias(MyCayley, tp.CayleyMap)
    composed = layer.weight
    tp.fuse(layer, strict=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert evaluated(layer) == {"closed": 1}
    assert torch.allclose(layer.weight, composed, atol=1e-6)
    registered = tp.register_parametrization(nn.Linear(5, 5), "weight", MySkew(), MyCayley(5))
    assert evaluated(registered) == {"closed": 1}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_original_that_is_not_finite_is_not_a_difference(bad):
    tp.alias(MySkew, tp.Skew)
    layer = nn.Linear(5, 5)
    layer.weight.data[0, 1] = bad
    tp.fuse(by_torch(layer, MySkew(), tp.CayleyMap()), strict=True)
    assert evaluated(layer) == {"closed": 1}
    assert layer.weight.isnan().all()


@pytest.mark.parametrize("registering", [False, True])
def test_a_wrong_alias_is_an_error(registering):
    class Inverse(MyCayley):
        def forward(self, x):
            return torch.linalg.solve(self.Id + x, self.Id - x)

    tp.alias(Inverse, tp.CayleyMap)
    with pytest.raises(
        ValueError, match="declared to mean Skew→CayleyMap, but its value differs: fused"
    ):
        if registering:
            layer = nn.Linear(5, 5)
            before = layer.weight, layer.weight.detach().clone()
            tp.register_parametrization(layer, "weight", tp.Skew(), Inverse(5))
        else:
            layer = by_torch(nn.Linear(5, 5), tp.Skew(), Inverse(5))
            tp.fuse(layer)
    if registering:
        assert layer.weight is before[0]
        assert torch.equal(*before)
        assert type(layer) is nn.Linear
    else:
        assert type(layer.parametrizations.weight) is tp.ParametrizationList


def test_a_wrong_gradient_is_found_too():
    class Detached(tp.CayleyMap):
        def forward(self, x):
            y = super().forward(x)
            return y.detach() + 0 * x

    tp.alias(Detached, tp.CayleyMap)
    with pytest.raises(ValueError, match="its gradient differs"):
        tp.register_parametrization(nn.Linear(5, 5), "weight", tp.Skew(), Detached())


def test_alias_takes_classes():
    with pytest.raises(TypeError, match="link must be a subclass of nn.Module"):
        tp.alias(MySkew(), tp.Skew)
    with pytest.raises(TypeError, match="meaning must be a subclass of nn.Module"):
        tp.alias(MySkew, "Skew")
