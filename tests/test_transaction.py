"""Registration and assignment that fail leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization as torch_register

import tritonparam as tp
from tests.test_register import (
    Double,
    accumulator,
    assert_unchanged,
    layer_of,
    orthogonal,
    snapshot,
)


class Bad(nn.Module):
    """A link that changes the shape."""

    def forward(self, x):
        return x[..., :1]


class Fails(nn.Module):
    """Its right inverse fails after other links have done theirs."""

    def forward(self, x):
        return x

    def right_inverse(self, x):
        raise RuntimeError("no")


FAILING = {
    "second link changes the shape": (tp.Symmetric(), Bad()),
    "first link changes the shape": (Bad(),),
    "second link fails": (tp.Symmetric(), Fails()),
    "not square": (tp.Skew(),),
}


@pytest.mark.parametrize("what", FAILING)
@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_failed_registration_leaves_no_trace(what, parametrized, fused):
    layer = nn.Linear(3, 4) if what == "not square" else nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.ones_like(layer.weight))  # symmetric: right_inverse changes it
    layer.eval()
    if parametrized:
        register = tp.register_parametrization if fused else torch_register
        register(layer, "weight", tp.Pruning(torch.ones_like(layer.weight)))
        register(layer, "bias", tp.Pruning(torch.ones(4)))
    weight, links = layer.weight.detach().clone(), FAILING[what]
    before, accumulators = snapshot(layer), {n: accumulator(p) for n, p in layer.named_parameters()}
    with pytest.raises((ValueError, RuntimeError)):
        tp.register_parametrization(layer, "weight", *links)
    assert_unchanged(layer, before)
    assert accumulators == {n: accumulator(p) for n, p in layer.named_parameters()}
    assert all(link.training for link in links)
    assert torch.equal(layer.weight, weight)
    layer(torch.ones(1, layer.in_features)).sum().backward()


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_failed_transfer_leaves_no_trace(parametrized):
    """The check of what is fused on somebody's word comes last."""
    layer, other = layer_of(tp.Skew(), tp.CayleyMap()), nn.Linear(4, 4)
    tp.register_parametrization(layer, "bias", Double())
    layer.weight = torch.diag(torch.tensor([-1.0, -1, 1, 1]))
    if parametrized:
        torch_register(other, "weight", tp.Pruning(torch.ones(4, 4)))
    modules = [layer, other]
    before = [snapshot(m) for m in modules]
    accumulators = [accumulator(p) for m in modules for p in m.parameters()]
    tp.add_rule((Double,), lambda links, x: x)
    with pytest.raises(ValueError, match="add_rule: Double"):
        tp.transfer_parametrizations_and_params(layer, other)
    for m, was in zip(modules, before, strict=True):
        assert_unchanged(m, was)
    assert accumulators == [accumulator(p) for m in modules for p in m.parameters()]
    other(torch.ones(1, 4)).sum().backward()


def test_a_failed_registration_restores_the_links():
    cayley = tp.CayleyMap()
    with pytest.raises(ValueError, match="may not change the shape"):
        tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), cayley, Bad())
    assert cayley.signature is None
    layer = layer_of(tp.Skew(), cayley, n=5)
    assert layer.weight.shape == (5, 5)


def test_a_registration_check_leaves_no_signs():
    # torch calls right_inverse when a further link is registered, and does not store the result.
    layer = layer_of(tp.Skew())
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.randn(4, 4) * 1e5)
    cayley = tp.CayleyMap()
    tp.register_parametrization(layer, "weight", cayley)
    assert torch.equal(cayley.signature, torch.ones(4))
    reused = tp.CayleyMap(4)
    reused.signature[2] = -1
    tp.register_parametrization(layer_of(tp.Skew()), "weight", reused)
    assert reused.signature.tolist() == [1, 1, -1, 1]


ASSIGNED = {
    "off the manifold": (torch.ones(4, 4), "must be orthogonal"),
    "nan": (torch.full((4, 4), torch.nan), "must be finite"),
    "inf": (torch.full((4, 4), torch.inf), "must be finite"),
    "another dtype": (torch.eye(4, dtype=torch.float64), "dtype"),
    "another size": (torch.eye(5), r"must have shape \[4, 4\]"),
    "not square": (torch.ones(4, 3), r"must have shape \[..., n, n\]"),
}


@pytest.mark.parametrize("what", ASSIGNED)
def test_a_failed_assignment_leaves_no_trace(what):
    layer = layer_of(tp.Skew(), tp.CayleyMap())
    layer.weight = orthogonal(4, -1.0)
    before, (value, message) = snapshot(layer), ASSIGNED[what]
    with pytest.raises(ValueError, match=message):
        layer.weight = value
    assert_unchanged(layer, before)


def test_links_that_succeeded_are_restored_when_a_later_one_fails():
    class Picky(nn.Module):
        def forward(self, x):
            return x

        def right_inverse(self, x):
            raise ValueError("picky")

    layer = layer_of(Double(), tp.CayleyMap())
    tp.unfuse(layer)
    layer.parametrizations.weight[0].__class__ = Picky
    tp.fuse(layer)
    before = snapshot(layer)
    with pytest.raises(ValueError, match="picky"):
        layer.weight = orthogonal(4, -1.0)
    assert_unchanged(layer, before)
