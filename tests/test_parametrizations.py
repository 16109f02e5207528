"""One-call constraints, the link behind ``orthogonal``, and the maps as functions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as theirs

import tritonparam as tp
from tests.cases import error
from tritonparam import functional

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAPS = ("matrix_exp", "cayley", "householder")
SHAPES = ((6, 6), (9, 4), (4, 9), (5, 1), (2, 7, 3), (2, 3, 3, 3), (2, 4, 5, 3), (1, 1))


def holder(weight: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def tall(w: torch.Tensor) -> torch.Tensor:
    return w if w.size(-2) >= w.size(-1) else w.mT


def defect(w: torch.Tensor) -> float:
    q = tall(w.detach().double())
    return float((q.mT @ q - torch.eye(q.size(-1), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_orthogonal_registers_trains_and_assigns(orthogonal_map, shape, dtype):
    eps = torch.finfo(dtype).eps
    before = torch.randn(shape).to(dtype)
    module = tp.orthogonal(holder(before.clone()), "weight", orthogonal_map)
    assert module.weight.dtype == dtype
    assert defect(module.weight) <= 16 * eps
    # It is the orthogonal factor of what it was.
    q, r = torch.linalg.qr(tall(before.double()))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    assert torch.allclose(tall(module.weight).double(), q, atol=16 * eps)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (module.weight.float() * torch.randn(shape)).sum().backward()
        optimizer.step()
    # 16-bit base points are orthonormal to their own eps.
    assert defect(module.weight) <= 32 * eps
    assert float((tall(module.weight).double() - q).detach().abs().max()) > 1e-3 or shape == (1, 1)
    target = torch.linalg.qr(torch.randn(tall(before).shape, dtype=torch.float64))[0]
    target = (target if before.size(-2) >= before.size(-1) else target.mT).to(dtype)
    module.weight = target
    assert torch.allclose(module.weight, target, rtol=0, atol=16 * eps)
    assert tp.stats()["composed"] == 0
    other = tp.orthogonal(holder(torch.randn(shape).to(dtype)), "weight", orthogonal_map)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", [(6, 6), (3, 5, 5)], ids=str)
@pytest.mark.parametrize("use_trivialization", [True, False])
def test_square_weights_are_torchs_and_load_its_checkpoints(
    orthogonal_map, shape, use_trivialization
):
    weight = torch.randn(shape, dtype=torch.float64)
    modules = [holder(weight.clone()), holder(weight.clone())]
    for module, library in zip(modules, (tp, theirs), strict=True):
        library.orthogonal(module, "weight", orthogonal_map, use_trivialization=use_trivialization)
    ours, torchs = modules
    if use_trivialization or orthogonal_map == "householder":
        assert torch.allclose(ours.weight, torchs.weight, atol=1e-13)
    with torch.no_grad():
        original = torchs.parametrizations.weight.original
        original += 0.3 * torch.randn(shape, dtype=torch.float64).tril(-1)
    ours.load_state_dict(torchs.state_dict())
    assert set(ours.state_dict()) == set(torchs.state_dict())
    g = torch.randn(shape, dtype=torch.float64)
    grads = [
        torch.autograd.grad(m.weight, m.parametrizations.weight.original, g)[0] for m in modules
    ]
    assert torch.allclose(ours.weight, torchs.weight, atol=1e-13)
    assert torch.allclose(grads[0].tril(-1), grads[1].tril(-1), atol=1e-12)


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_without_a_base_point_every_shape_is_torchs(orthogonal_map):
    for shape in SHAPES:
        weight = torch.randn(shape, dtype=torch.float64)
        modules = [holder(weight.clone()), holder(weight.clone())]
        for module, library in zip(modules, (tp, theirs), strict=True):
            library.orthogonal(module, "weight", orthogonal_map, use_trivialization=False)
        assert torch.allclose(modules[0].weight, modules[1].weight, atol=1e-12), shape


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
def test_the_curve_through_a_tall_base_point_is_that_of_the_large_matrix(orthogonal_map):
    n, k = 9, 4
    x = torch.randn(n, k, dtype=torch.float64)
    b = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]
    omega, p = (b.T @ x - x.T @ b) / 2, x - b @ (b.T @ x)
    a = b @ omega @ b.T + p @ b.T - b @ p.T
    eye = torch.eye(n, dtype=torch.float64)
    large = torch.linalg.solve(eye - a / 2, eye + a / 2)
    if orthogonal_map == "matrix_exp":
        large = torch.matrix_exp(torch.stack((a, a)))[0]
    for path in ("closed", "composed"):
        with tp.use_path(path):
            w = functional.orthogonal(x, orthogonal_map, base=b)
        assert torch.allclose(w, large @ b, atol=1e-13)


def test_weight_decay_does_not_zero_a_householder_weight():
    module = tp.orthogonal(nn.Linear(4, 6), "weight")
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module.weight.sum().backward()
        optimizer.step()
    assert defect(module.weight) <= 1e-5


def test_nothing_of_a_tall_weight_is_larger_than_it():
    for orthogonal_map in MAPS:
        layer = tp.orthogonal(nn.Embedding(3000, 5), "weight", orthogonal_map)
        layer.weight.sum().backward()
        assert all(x.numel() <= 15000 for x in layer.state_dict().values())
        assert defect(layer.weight) <= 1e-5


def test_defaults_and_copies():
    square, wide = tp.orthogonal(nn.Linear(5, 5)), tp.orthogonal(nn.Linear(5, 3))
    assert square.parametrizations.weight[0].orthogonal_map == "matrix_exp"
    assert wide.parametrizations.weight[0].orthogonal_map == "householder"
    twin = copy.deepcopy(wide)
    tp.remove_parametrizations(twin, "weight")
    assert torch.allclose(twin.weight, wide.weight)
    assert "base" in repr(list(wide.parametrizations.weight[0]._buffers))
    assert "householder" in repr(wide)


def test_orthogonal_refuses():
    layer = nn.Linear(4, 6)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="orthogonal_map must be one of matrix_exp, cayley"):
        tp.orthogonal(layer, "weight", "qr")
    with pytest.raises(ValueError, match=r"must have shape \[..., n, k\], got \[6\]"):
        tp.orthogonal(layer, "bias")
    with pytest.raises(ValueError, match="name must be that of a parameter.*'weights'"):
        tp.orthogonal(layer, "weights")
    with pytest.raises(TypeError, match=r"real floating-point dtype, got torch\.complex64"):
        tp.orthogonal(holder(torch.randn(3, 3, dtype=torch.complex64)))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    tp.orthogonal(layer, "weight", "cayley")
    kept = copy.deepcopy(layer.state_dict())
    for bad in (torch.full((6, 4), torch.nan), torch.full((6, 4), torch.inf)):
        with pytest.raises(tp.NoPreimage, match="must be finite"):
            layer.weight = bad
    with pytest.raises(ValueError, match=r"shape \[6, 4\] as the base point has, got \[7, 4\]"):
        layer.weight = torch.eye(7, 4)
    free = tp.orthogonal(nn.Linear(4, 4), "weight", "cayley", use_trivialization=False)
    with pytest.raises(tp.NoPreimage, match="use_trivialization=True"):
        free.weight = torch.eye(4)
    bases = (torch.ones(6, 4), torch.eye(6))
    for base, message in zip(
        bases, ("must be orthonormal", r"must be of shape \[6, 4\]"), strict=True
    ):
        state = {**kept, "parametrizations.weight.0.base": base}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
    assert all(torch.equal(kept[k], v) for k, v in layer.state_dict().items())


def test_spd_keeps_a_positive_definite_weight_and_can_be_assigned():
    a = torch.randn(5, 5, dtype=torch.float64)
    p = a @ a.T + torch.eye(5)
    module = tp.spd(holder(p.clone()))
    assert torch.allclose(module.weight, p, rtol=1e-12)
    module.weight = 2 * p
    assert torch.allclose(module.weight, 2 * p, rtol=1e-12)
    for value in (-p, -torch.eye(5), torch.eye(5).flip(0)):
        with pytest.raises(tp.NoPreimage, match="eigenvalue|determinant"):
            module.weight = value
    even = tp.spd(holder(torch.eye(4)))
    rotation = torch.tensor([[0.0, -1], [1, 0]]).kron(torch.eye(2))
    for value in (-torch.eye(4), rotation):  # whose logarithm is skew
        with pytest.raises(tp.NoPreimage, match="a matrix whose eigenvalues are all positive"):
            even.weight = value
    other = tp.positive_definite(holder(a.clone()))
    assert (torch.linalg.eigvalsh(other.weight) > 0).all()


def test_symmetric_and_skew():
    for call, sign in ((tp.symmetric, 1), (tp.skew, -1)):
        layer = call(nn.Linear(4, 4))
        assert torch.equal(layer.weight, sign * layer.weight.T)
        layer.weight = torch.zeros(4, 4)
        with pytest.raises(tp.NoPreimage):
            layer.weight = torch.arange(16.0).reshape(4, 4)
        with pytest.raises(ValueError, match=r"must have shape \[..., n, n\], got \[4, 3\]"):
            call(nn.Linear(3, 4))


@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm"])
def test_norms_are_torchs(name):
    for make in (lambda: nn.Linear(7, 4), lambda: nn.ConvTranspose2d(3, 5, 3)):
        torch.manual_seed(1)
        ours = getattr(tp, name)(make())
        torch.manual_seed(1)
        torchs = getattr(theirs, name)(make())
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in torchs.state_dict().items()
        }
        torchs.load_state_dict(ours.state_dict())
        for _ in range(3):
            assert torch.allclose(ours.weight, torchs.weight, atol=1e-6)
        for mine, other in zip(
            ours.state_dict().values(), torchs.state_dict().values(), strict=True
        ):
            assert torch.allclose(mine, other, atol=1e-6)
        assert tp.stats(reset=True)["composed"] == 0
        with pytest.raises(ValueError, match="name must be that of"):
            getattr(tp, name)(make(), "weights")
    whole = nn.Module()
    whole.register_buffer("weight", torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=f"{name}: .* floating-point dtype, got torch.int64"):
        getattr(tp, name)(whole)


def test_weight_norm_is_the_first_link():
    layer = tp.skew(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="must be the first link.*but weight is parametrized"):
        tp.weight_norm(layer)
    assert len(layer.parametrizations.weight) == 1


def test_weight_norm_loads_legacy_checkpoints():
    legacy = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    ours = tp.weight_norm(nn.Linear(3, 2))
    ours.load_state_dict(legacy.state_dict())
    legacy(torch.ones(1, 3))
    assert torch.allclose(ours.weight, legacy.weight)


def test_chains_are_fused_where_they_match():
    module = holder(torch.randn(5, 5))
    tp.weight_norm(module)
    mask = (torch.rand(5, 5) < 0.7).float()
    tp.register_parametrization(module, "weight", tp.Pruning(mask), tp.Skew(), tp.CayleyMap())
    tp.stats(reset=True)
    weight = module.weight
    assert tp.stats() == {"kernel": 0, "closed": 2, "composed": 0}
    with tp.use_path("composed"):
        assert torch.allclose(module.weight, weight, atol=1e-6)
    row = tp.explain(module)[0]
    assert row.path == "closed"
    assert "Pruning is composed" in row.reason
    with tp.use_path("composed"):
        assert tp.explain(module)[0].path == "composed"
    assert tp.fuse(module, strict=True) is module
    parameters = list(module.parametrizations.weight.parameters())
    fused = torch.autograd.grad(module.weight.cos().sum(), parameters)
    with tp.use_path("composed"):
        composed = torch.autograd.grad(module.weight.cos().sum(), parameters)
    for mine, theirs_ in zip(fused, composed, strict=True):
        assert torch.allclose(mine, theirs_, atol=1e-5)


def test_functions_equal_links_and_have_derivatives():
    w = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([[1.0, -1.0, 1.0, 1.0]] * 2)
    pairs = (
        (functional.skew_cayley, (tp.Skew(), tp.CayleyMap())),
        (functional.skew_exp, (tp.Skew(), tp.MatrixExponential())),
        (functional.symmetric_exp, (tp.Symmetric(), tp.MatrixExponential())),
        (functional.matrix_exp, (tp.MatrixExponential(),)),
    )
    for function, links in pairs:
        y = w
        for link in links:
            y = link(y)
        assert error(function(w).detach(), y.detach()) <= 1e-13
        assert torch.autograd.gradcheck(function, w)
        with torch.autocast("cpu", torch.bfloat16):
            assert function(w.float()).dtype == torch.float32
        (dw,) = torch.autograd.grad(function(w).sum(), w)
        assert torch.allclose(torch.func.grad(lambda w, f=function: f(w).sum())(w.detach()), dw)
    q = functional.skew_cayley(w, signs)
    assert torch.allclose(q * signs.unsqueeze(-2), functional.skew_cayley(w))
    with pytest.raises(ValueError, match=r"signature must have shape \[2, 4\], got \[4\]"):
        functional.skew_cayley(w, signs[0])
    with pytest.raises(ValueError, match=r"must have shape \[..., n, n\]"):
        functional.skew_exp(w[:, :3])
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="base must have orthonormal columns"):
        functional.orthogonal(x, "cayley", base=torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"base must have the shape of x, \[5, 3\], got \[3, 3\]"):
        functional.orthogonal(x, "cayley", base=torch.eye(3))


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (2, 3, 2), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("at_base", [False, True])
def test_orthogonal_has_two_derivatives_in_every_shape(orthogonal_map, shape, at_base):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = None
    if at_base:
        q = torch.linalg.qr(torch.randn(tall(x).shape, dtype=torch.float64))[0]
        base = q if shape[-2] >= shape[-1] else q.mT

    def function(x):
        return functional.orthogonal(x, orthogonal_map, base=base)

    assert defect(function(x)) <= 1e-13
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)
    assert tp.stats()["composed"] == 0
