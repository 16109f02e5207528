"""Registration, assignment and removal: torch's meaning, all or nothing, in place."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization as torch_register

import tritonparam as tp
from tritonparam.fuse import FusedParametrizationList


class Double(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


class RankOne(nn.Module):
    def forward(self, x, y):
        return x.unsqueeze(-1) @ y.unsqueeze(-2)

    def right_inverse(self, z):
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        root = s[0].sqrt().unsqueeze(-1)
        return u[..., :, 0] * root, vh[..., 0, :] * root


def accumulator(p: torch.Tensor):
    return p.view_as(p).grad_fn.next_functions[0][0]


def snapshot(module: nn.Module) -> dict:
    return {
        "class": type(module),
        "attributes": {k: v for k, v in vars(module).items() if not k.startswith("_")},
        "keys": list(module.state_dict()),
        "values": copy.deepcopy(module.state_dict()),
        "identity": {name: id(p) for name, p in module.named_parameters()},
        "storage": {name: p.data_ptr() for name, p in module.named_parameters()},
        "modules": [(name, id(m), m.training) for name, m in module.named_modules()],
    }


def assert_unchanged(module: nn.Module, before: dict) -> None:
    after = snapshot(module)
    values = after.pop("values"), {**before}.pop("values")
    assert {k: v for k, v in before.items() if k != "values"} == after
    for key, value in values[1].items():
        assert torch.equal(values[0][key], value), key


def orthogonal(n: int, det: float = 1.0) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(n, n))[0]
    q[:, 0] *= torch.sign(torch.det(q) * det)
    return q


def layer_of(*links: nn.Module, n: int = 4) -> nn.Module:
    return tp.register_parametrization(nn.Linear(n, n), "weight", *links)


def test_one_call_with_several_links_is_several_calls():
    state = nn.Linear(4, 4).state_dict()
    one, several = nn.Linear(4, 4), nn.Linear(4, 4)
    for layer in (one, several):
        layer.load_state_dict(state)
    tp.register_parametrization(one, "weight", tp.Skew(), tp.CayleyMap())
    for link in (tp.Skew(), tp.CayleyMap()):
        tp.register_parametrization(several, "weight", link)
    assert torch.equal(one.parametrizations.weight.original, state["weight"])
    assert torch.equal(one.weight, several.weight)
    assert list(one.state_dict()) == list(several.state_dict())


def test_parameter_and_its_accumulator_survive():
    layer = nn.Linear(4, 4)
    weight = layer.weight
    node, storage = accumulator(weight), weight.data_ptr()
    tp.register_parametrization(layer, "weight", tp.Skew(), tp.CayleyMap())
    layer.weight = orthogonal(4)
    tp.remove_parametrizations(layer, "weight")
    assert layer.weight is weight
    assert accumulator(weight) is node
    assert weight.data_ptr() == storage
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_values_of_registration_assignment_removal():
    layer = nn.Linear(4, 4)
    q = orthogonal(4)
    tp.register_parametrization(layer, "weight", tp.Skew(), tp.CayleyMap())
    layer.weight = q
    assert torch.allclose(layer.weight, q, atol=1e-5)
    value = layer.weight.detach()
    tp.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, value)
    tp.register_parametrization(layer, "weight", Double())
    assert torch.allclose(layer.weight, value)
    tp.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.allclose(layer.weight, value / 2)


def test_assignment_does_not_alias():
    layer = layer_of(tp.Pruning(torch.ones(4, 4)))
    value = torch.ones(4, 4)
    layer.weight = value
    value.zero_()
    assert torch.equal(layer.weight, torch.ones(4, 4))


def test_optimizers_keep_working():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    tp.register_parametrization(layer, "weight", tp.Skew(), tp.CayleyMap())
    before = layer.weight.detach()
    layer.weight[0, 1].backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_buffers_can_be_constrained():
    layer = nn.BatchNorm1d(3)
    layer.register_buffer("extra", torch.randn(3, 3))
    tp.register_parametrization(layer, "extra", tp.Skew(), tp.CayleyMap())
    assert not layer.extra.requires_grad
    layer.extra = orthogonal(3, -1.0)
    tp.remove_parametrizations(layer, "extra")
    assert torch.allclose(layer.extra @ layer.extra.T, torch.eye(3), atol=1e-5)
    assert "extra" in dict(layer.named_buffers())


def test_several_originals():
    layer = nn.Linear(4, 3)
    tp.register_parametrization(layer, "weight", RankOne())
    assert list(dict(layer.named_parameters())) == [
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    ]
    originals = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    value = torch.outer(torch.randn(3), torch.randn(4))
    layer.weight = value
    assert torch.allclose(layer.weight, value, atol=1e-6)
    assert layer.parametrizations.weight.original0 is originals[0]
    with pytest.raises(ValueError, match="parametrized in terms of a sequence of tensors"):
        tp.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert tp.is_parametrized(layer, "weight")
    tp.remove_parametrizations(layer, "weight")
    assert torch.allclose(layer.weight, value, atol=1e-6)
    assert isinstance(layer.weight, nn.Parameter)


def test_unsafe_links_may_change_the_shape():
    class Half(nn.Module):
        def forward(self, x):
            return x[:2]

    layer = tp.register_parametrization(nn.Linear(4, 4), "weight", Half(), unsafe=True)
    assert layer.weight.shape == (2, 4)
    with pytest.raises(ValueError, match="may not change the shape"):
        tp.register_parametrization(nn.Linear(4, 4), "weight", Half())


def test_the_order_of_parameters_comes_back():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("a", "b", "c"):
                self.register_parameter(name, nn.Parameter(torch.randn(2, 2)))

    module = Three()
    tp.register_parametrization(module, "b", tp.Skew())
    tp.register_parametrization(module, "a", tp.Skew())
    module.d = nn.Parameter(torch.ones(1))
    tp.remove_parametrizations(module, "b")
    tp.remove_parametrizations(module, "a")
    assert list(module._parameters) == ["a", "b", "c", "d"]
    assert type(module) is Three


def test_wrong_kinds_of_matrix():
    spd = torch.eye(4) + 0.5 * torch.ones(4, 4)
    layer = layer_of(tp.Skew(), tp.MatrixExponential())
    with pytest.raises(tp.NoPreimage, match="Skew: the assigned matrix must equal minus"):
        layer.weight = spd
    with pytest.raises(tp.NoPreimage, match="Skew: the assigned matrix must equal minus"):
        layer.weight = spd * 1e-3 + 0.999 * torch.eye(4)
    with pytest.raises(tp.NoPreimage, match="real principal logarithm"):
        layer.weight = orthogonal(4, -1.0)
    layer.weight = orthogonal(4)
    layer = layer_of(tp.Symmetric(), tp.MatrixExponential())
    layer.weight = spd
    assert torch.allclose(layer.weight, spd, atol=1e-5)
    with pytest.raises(tp.NoPreimage, match="Symmetric: the assigned matrix must equal its"):
        layer.weight = orthogonal(4)
    with pytest.raises(tp.NoPreimage, match="eigenvalue"):
        layer.weight = -spd


def test_registering_never_fails_because_of_values():
    for value in (torch.zeros(3, 3), torch.full((3, 3), torch.nan), torch.eye(3), torch.ones(3, 3)):
        for links in (
            (tp.Skew(), tp.CayleyMap()),
            (tp.Skew(), tp.MatrixExponential()),
            (tp.Symmetric(), tp.MatrixExponential()),
            (tp.CayleyMap(),),
        ):
            if not value.isfinite().all() and isinstance(links[0], tp.CayleyMap):
                continue  # LAPACK refuses NaN, as in torch
            layer = nn.Linear(3, 3)
            layer.weight = nn.Parameter(value.clone())
            tp.register_parametrization(layer, "weight", *links)


def test_empty_weights():
    layer = layer_of(tp.Skew(), tp.CayleyMap(), n=0)
    assert layer.weight.shape == (0, 0)
    layer.weight = torch.empty(0, 0)
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(0, 3, 3))
    tp.register_parametrization(module, "weight", tp.Skew(), tp.CayleyMap())
    module.weight.sum().backward()
    assert module.parametrizations.weight.original.grad.shape == (0, 3, 3)


def test_arguments_of_registration():
    layer = nn.Linear(3, 3, bias=False)
    before = snapshot(layer)
    register = tp.register_parametrization
    with pytest.raises(ValueError, match=r"got 'wieght', which is not there; it has weight\."):
        register(layer, "wieght", tp.Skew())
    with pytest.raises(ValueError, match="got 'bias', which is None; it has weight"):
        register(layer, "bias", tp.Skew())
    with pytest.raises(
        TypeError, match=r"must be an nn.Module, got <class .*Skew'>; pass an instance"
    ):
        register(layer, "weight", tp.Skew)
    with pytest.raises(TypeError, match="the model must be an nn.Module, got Parameter"):
        register(layer.weight, "weight", tp.Skew())
    integers = nn.Module()
    integers.register_buffer("count", torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="CayleyMap: the tensor must have a floating-point dtype"):
        register(integers, "count", tp.Skew(), tp.CayleyMap())
    assert "count" in integers._buffers
    assert_unchanged(layer, before)
    assert register(layer, "weight", parametrization=tp.Skew()) is layer
    theirs = inspect.signature(torch_register).parameters
    ours = inspect.signature(register).parameters
    assert set(theirs) <= set(ours)


def test_arguments_of_removal():
    layer = layer_of(tp.Skew())
    with pytest.raises(ValueError, match=r"of ParametrizedLinear, got 'bias'; it has weight\."):
        tp.remove_parametrizations(layer, "bias")
    with pytest.raises(ValueError, match="got 'weight'; it has none"):
        tp.remove_parametrizations(nn.Linear(2, 2), "weight")


def test_removal_that_cannot_read_the_weight_changes_nothing():
    layer = layer_of(tp.Skew(), tp.CayleyMap())
    layer.parametrizations.weight[0].forward = lambda x: 1 / 0
    before = snapshot(layer)
    with pytest.raises(ZeroDivisionError):
        tp.remove_parametrizations(layer, "weight")
    assert_unchanged(layer, before)


def test_batched_weights():
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 4, 4))
    tp.register_parametrization(module, "weight", tp.Skew(), tp.CayleyMap(4))
    value = torch.stack([orthogonal(4, det) for det in (1.0, -1.0, -1.0)])
    module.weight = value
    assert torch.allclose(module.weight, value, atol=1e-5)
    assert module.parametrizations.weight[1].signature.shape == (3, 4)


def test_what_is_transferred_is_fused_where_it_was():
    layer = tp.register_parametrization(nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())
    torch_register(layer, "bias", Double())
    value = torch.diag(torch.tensor([-1.0, -1, 1, 1]))  # signs that other values would not need
    layer.weight = value
    layer.parametrizations.bias[0].register_buffer("base", torch.ones(2, requires_grad=True))
    other = tp.transfer_parametrizations_and_params(layer, nn.Linear(4, 4))
    assert torch.equal(layer.weight, value)
    for name, kind in (("weight", FusedParametrizationList), ("bias", tp.ParametrizationList)):
        assert type(other.parametrizations[name]) is kind
        assert torch.equal(getattr(other, name), getattr(layer, name))
    with tp.cached():
        assert other.weight is other.weight
    third = tp.transfer_parametrizations_and_params(
        layer, tp.spectral_norm(nn.Linear(4, 4)), "bias"
    )
    assert list(third.parametrizations) == ["weight", "bias"]
    assert tp.transfer_parametrizations_and_params(nn.Linear(4, 4), third) is third
