"""What PyTorch's own tests ask of parametrizations, asked of fused ones through the plugin."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

import tritonparam as tp
from tritonparam.fuse import FusedParametrizationList
from tritonparam.pytest_plugin import fused_registrations


class LowerSkew(nn.Module):
    def forward(self, x):
        x = x.tril(-1)
        return x - x.mT


class Cayley(nn.Module):
    """Not a map of ours: the transpose of what it would be."""

    def forward(self, x):
        eye = torch.eye(x.size(-1), dtype=x.dtype)
        return torch.linalg.solve(eye + x, eye - x).contiguous()


class Affine(nn.Module):
    def __init__(self, factor: float = 2.0, shift: float = 0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x):
        return self.factor * x + self.shift

    def right_inverse(self, y):
        return (y - self.shift) / self.factor


class Outer(nn.Module):
    def forward(self, x, y):
        return x.unsqueeze(-1) @ y.unsqueeze(-2)

    def right_inverse(self, z):
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        return u[:, 0] * s[0].sqrt(), vh[0] * s[0].sqrt()


@pytest.fixture(autouse=True, params=[False, True], ids=["set", "swap"])
def _routed(request):
    """Registrations are fused; torch moves modules by ``set_`` and by swapping tensors."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    with fused_registrations():
        yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def register(module: nn.Module, name: str, *links: nn.Module, unsafe: bool = False) -> nn.Module:
    for link in links:
        parametrize.register_parametrization(module, name, link, unsafe=unsafe)
    assert type(module.parametrizations[name]) is FusedParametrizationList
    return module


@pytest.mark.parametrize(
    "links", [(tp.Skew, tp.CayleyMap), (LowerSkew, Cayley)], ids=["fused", "composed"]
)
@pytest.mark.parametrize("leave_parametrized", [False, True])
def test_registering_training_and_removing(links, leave_parametrized):
    layer = nn.Linear(8, 8)
    before = layer.weight, layer.weight.detach().clone(), layer.bias
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    register(layer, "weight", *(link() for link in links))
    assert "weight" not in layer._parameters
    assert [name for name, _ in layer.named_parameters()] == [
        "bias",
        "parametrizations.weight.original",
    ]
    assert torch.allclose(layer.weight.mT @ layer.weight, torch.eye(8), atol=1e-5)
    values = []
    for _ in range(2):
        values.append(layer.weight.detach().clone())
        optimizer.zero_grad()
        (layer.weight.mT @ layer.bias).sum().backward()
        optimizer.step()
    assert not torch.equal(*values)
    last = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)
    assert type(layer) is nn.Linear
    assert not hasattr(layer, "parametrizations")
    assert layer.weight is before[0]
    assert layer.bias is before[2]
    assert torch.equal(layer.weight, last) == leave_parametrized
    optimizer.zero_grad()
    layer.weight.square().sum().backward()
    optimizer.step()


def test_a_list_can_be_parametrized_itself():
    layer = register(nn.Linear(8, 8), "weight", tp.Skew(), tp.CayleyMap())
    plist = layer.parametrizations.weight
    register(plist, "original", LowerSkew())
    assert torch.equal(plist.original, -plist.original.mT)
    assert torch.allclose(layer.weight.mT @ layer.weight, torch.eye(8), atol=1e-5)
    parametrize.remove_parametrizations(plist, "original", leave_parametrized=False)
    assert plist.__class__ is parametrize.ParametrizationList
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(layer) is nn.Linear


def test_buffers():
    layer = nn.Linear(8, 8)
    del layer.bias
    layer.register_buffer("bias", torch.ones(8))
    register(layer, "bias", Affine(), Affine(1.0, 3.0))
    assert len(list(layer.parameters())) == 1
    value = layer.bias.clone()
    parametrize.remove_parametrizations(layer, "bias")
    assert torch.equal(layer.bias, value)
    assert "bias" in layer._buffers


def test_right_inverses_initialise_and_refuse():
    layer = nn.Linear(5, 5)
    layer.weight.data = tp.Skew()(layer.weight.data)
    register(layer, "weight", tp.Skew())
    x = torch.rand(5, 5)
    with pytest.raises(ValueError, match="Skew"):
        layer.weight = x
    layer.weight = x - x.mT
    assert torch.equal(layer.parametrizations.weight.original, (x - x.mT).triu(1))
    register(layer, "weight", tp.CayleyMap())
    with pytest.raises(ValueError, match="CayleyMap"):
        layer.weight = x
    q = torch.linalg.qr(x)[0]
    layer.weight = q
    assert torch.allclose(layer.weight, q, atol=1e-5)


def test_links_that_break_the_rules_are_torchs_errors():
    class Returns(nn.Module):
        def __init__(self, forward=None, right_inverse=None):
            super().__init__()
            self.f = forward or (lambda x: x)
            if right_inverse:
                self.right_inverse = right_inverse

        def forward(self, x):
            return self.f(x)

    wrong = (
        (lambda x: 2, None, "must return a tensor"),
        (lambda x: x.bool(), None, "may not change the dtype"),
        (lambda x: x[:-1], None, "may not change the shape"),
        (None, lambda x: x[:-1].clone(), "shape"),
        (None, lambda x: x.bool(), "dtype"),
    )
    parametrized = register(nn.Linear(3, 4), "weight", Affine(1.0))
    weight = parametrized.weight.detach().clone()
    for forward, right_inverse, message in wrong:
        fresh = nn.Linear(3, 4)
        for layer in (fresh, parametrized):
            with pytest.raises(ValueError, match=message):
                register(layer, "weight", Returns(forward, right_inverse))
        assert not parametrize.is_parametrized(fresh)
        assert len(parametrized.parametrizations.weight) == 1
        assert torch.equal(parametrized.weight, weight)
    fresh = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="does not have a parameter"):
        register(fresh, "foo", Affine())
    with pytest.raises(ValueError, match="does not have a parametrization"):
        parametrize.remove_parametrizations(fresh, "weight")


def test_several_originals():
    layer = register(nn.Linear(3, 3), "weight", Outer())
    value = layer.weight.detach().clone()
    register(layer, "weight", Affine())
    assert torch.allclose(layer.weight, 2 * value, atol=1e-6)
    assert len(list(layer.parameters())) == 3
    (layer.weight.mT @ layer.bias).sum().backward()
    with pytest.raises(ValueError, match="leave_parametrized=False"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert torch.linalg.matrix_rank(layer.weight) == 1
    frozen = nn.Linear(3, 3)
    frozen.weight.requires_grad_(False)
    register(frozen, "weight", Outer())
    assert not any(x.requires_grad for x in frozen.parametrizations.parameters())


def test_caching_training_mode_types_and_transfer():
    layer = nn.Linear(5, 5).eval()
    register(layer, "weight", tp.Skew())
    assert not layer.parametrizations.weight[0].training
    register(layer.train(), "weight", tp.CayleyMap().eval())
    assert layer.parametrizations.weight[1].training
    assert parametrize.type_before_parametrizations(layer) is nn.Linear
    other = parametrize.transfer_parametrizations_and_params(layer, nn.Linear(5, 5))
    assert type(other.parametrizations.weight) is FusedParametrizationList
    assert torch.equal(other.weight, layer.weight)
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert other.weight is other.weight
        assert other.weight is not layer.weight
    parametrize.remove_parametrizations(other, "weight")
    assert parametrize.is_parametrized(layer, "weight")
    several = register(nn.Linear(3, 3), "weight", Outer(), Affine())
    moved = parametrize.transfer_parametrizations_and_params(several, nn.Linear(3, 3), "weight")
    assert torch.allclose(moved.weight, several.weight, atol=1e-6)


def test_copies_and_pickles():
    layer = register(nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())
    theirs.weight_norm(layer, "bias")
    twin = copy.deepcopy(layer)
    assert vars(twin).keys() == vars(layer).keys()
    for x, y in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(x, y)
        assert x is not y
    assert torch.equal(twin(torch.eye(4)), layer(torch.eye(4)))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(layer)


@pytest.mark.parametrize("home", [parametrize, tp], ids=["theirs", "ours"])
@pytest.mark.parametrize("leave_parametrized", [False, True])
def test_links_that_make_and_unmake_tensor_subclasses(home, leave_parametrized):
    class Wrap(nn.Module):
        def forward(self, x):
            return TwoTensor(x, x)

    class Unwrap(nn.Module):
        def forward(self, x):
            return x.a

    class WrapOriginal(nn.Module):
        def forward(self, x):
            return x

        def right_inverse(self, x):
            return TwoTensor(x.clone(), x.clone())  # x is where it will be

    for link, before, original, after in (
        (Wrap, torch.Tensor, torch.Tensor, TwoTensor),
        (Unwrap, TwoTensor, TwoTensor, torch.Tensor),
        (WrapOriginal, torch.Tensor, TwoTensor, TwoTensor),
    ):
        left = after if leave_parametrized else original
        if left is not before and not torch.__future__.get_swap_module_params_on_conversion():
            continue  # torch can only swap a subclass into its place
        layer = nn.Linear(2, 2)
        layer.register_buffer("buffer", torch.ones(2, 2))
        if before is TwoTensor:
            layer._apply(lambda x: TwoTensor(x, x))
        for name, plain in (("weight", nn.Parameter), ("buffer", torch.Tensor)):
            x = getattr(layer, name)
            home.register_parametrization(layer, name, link())
            assert type(layer.parametrizations[name]) is FusedParametrizationList
            assert type(getattr(layer, name)) is after
            if link is WrapOriginal:
                setattr(layer, name, torch.zeros(2, 2))
                assert not getattr(layer, name).a.any()
            home.remove_parametrizations(layer, name, leave_parametrized=leave_parametrized)
            assert getattr(layer, name) is x
            assert type(x) is (plain if left is torch.Tensor else TwoTensor)
            assert isinstance(x, nn.Parameter) == (plain is nn.Parameter)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_spectral_norm(requires_grad):
    layer = nn.Linear(3, 4).double()
    layer.weight.requires_grad_(requires_grad)
    theirs.spectral_norm(layer)
    link, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    assert set(link._buffers) == {"_u", "_v"}
    assert layer.weight.stride() == original.stride()
    saved = link._u.clone(), link._v.clone()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def several(x, modes=(True, True)):
        with torch.no_grad():
            link._u.copy_(saved[0])
            link._v.copy_(saved[1])
        return sum(layer.train(mode)(x) for mode in modes)

    assert torch.autograd.gradcheck(several, x, check_batched_grad=False)
    mixed = (True, False, True, False)
    assert torch.autograd.gradcheck(lambda x: several(x, mixed), x, check_batched_grad=False)
    last = layer.train()(x)
    vectors = link._u.clone(), link._v.clone()
    assert torch.allclose(layer.eval()(x), last)
    assert torch.equal(vectors[0], link._u)
    assert torch.equal(vectors[1], link._v)
    if requires_grad:
        assert torch.autograd.gradcheck(lambda w: layer(x), original)
    del last  # a graph that is alive keeps a parameter from being swapped
    parametrize.remove_parametrizations(layer, "weight")
    transposed = theirs.spectral_norm(nn.ConvTranspose2d(3, 4, (5, 6)))
    assert transposed.parametrizations.weight[0]._u.shape == (4,)
    diagonal = nn.Linear(2, 2)
    diagonal.weight.data = torch.diag(torch.tensor([0.5, -2.0]))
    theirs.spectral_norm(theirs.spectral_norm(diagonal), "bias")
    assert torch.allclose(diagonal.weight, torch.diag(torch.tensor([0.25, -1.0])), atol=1e-6)


def test_checkpoints_of_spectral_norm():
    layer = theirs.spectral_norm(nn.Linear(3, 5))
    x = torch.randn(2, 3)
    for _ in range(3):
        layer(x)
    saved = copy.deepcopy(layer.state_dict())
    outcomes = []
    for _ in range(2):
        parametrize.remove_parametrizations(layer, "weight")
        theirs.spectral_norm(layer).load_state_dict(saved)
        with torch.no_grad():
            outcomes.append([layer.train(mode)(x) for mode in (False, True, True, False)])
    for once, again in zip(*outcomes, strict=True):
        assert torch.equal(once, again)
    for key in list(saved):
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"nonsense\""):
            layer.load_state_dict({**saved, "nonsense": saved[key]})
        layer.load_state_dict({k: v for k, v in saved.items() if k != key}, strict=False)


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=["real", "complex"])
def test_orthogonal(shape, dtype):
    def factor(w):
        t = w if w.size(0) >= w.size(1) else w.mT
        q, r = torch.linalg.qr(t)
        q = q * r.diagonal().sgn()
        return q if w.size(0) >= w.size(1) else q.mT

    maps = ("matrix_exp", "cayley") + (("householder",) if not dtype.is_complex else ())
    for orthogonal_map, base in itertools.product(maps, (False, True)):
        layer = nn.Linear(*shape, dtype=dtype)
        initial = layer.weight.detach().clone()
        theirs.orthogonal(layer, "weight", orthogonal_map, use_trivialization=base)
        x = torch.randn(3, shape[0], dtype=dtype)
        for value in (initial, torch.randn_like(initial), factor(torch.randn_like(initial))):
            if base or orthogonal_map == "householder":
                layer.weight = value
                assert torch.allclose(layer.weight, factor(value), atol=1e-5)
            else:
                with pytest.raises(NotImplementedError, match="not possible to assign"):
                    layer.weight = value
        with pytest.raises((ValueError, NotImplementedError)):
            layer.weight = torch.randn(9, 9, dtype=dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).norm().backward()
            grad = layer.parametrizations.weight.original.grad
            other = grad.triu(1) if grad.size(0) >= grad.size(1) else grad.tril(-1)
            assert not other.any()
            assert torch.allclose(grad.diagonal().real, torch.zeros(min(shape)), atol=1e-6)
            optimizer.step()
            t = layer.weight if layer.weight.size(0) >= layer.weight.size(1) else layer.weight.mT
            assert torch.allclose(t.mH @ t, torch.eye(min(shape), dtype=dtype), atol=1e-5)
    assert (tp.stats()["closed"] > 0) != dtype.is_complex


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weight_norm(dim, dtype):
    layer = nn.Linear(4, 5, dtype=dtype)
    x = torch.randn(3, 4, dtype=dtype)
    expected = layer(x).detach()
    theirs.weight_norm(layer, dim=dim)
    close = {"rtol": 1.6e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-6}
    assert torch.allclose(layer(x), expected, **close)
    if dim is None and dtype == torch.bfloat16:  # torch's two roundings of this norm cancel
        assert torch.equal(layer(x), expected)
        (row,) = tp.explain(layer)
        assert row.reason == "one norm for a whole tensor of 16 bits is rounded as torch does it"
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.allclose(layer(x), expected, **close)
