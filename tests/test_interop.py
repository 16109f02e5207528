"""Models that geotorch constrained, fused: geotorch's values, state, assignment and training."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

import tritonparam as tp
from tests.test_torch_models import Largest, assert_same_bits, state
from tritonparam import interop

geotorch = pytest.importorskip("geotorch", minversion="0.4")
SymF = pytest.importorskip("geotorch.symmetric").SymF

TRIVIALIZATIONS = ("expm", "cayley")


def of_shape(*shape: int) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    return module


def registered(manifold: nn.Module, *shape: int) -> nn.Module:
    """A module on which a manifold is registered as geotorch does it, at a point of it."""
    module = of_shape(*shape)
    # geotorch samples tall almost orthogonal weights of a wrong shape.
    wide = isinstance(manifold, geotorch.AlmostOrthogonal)
    source = geotorch.Stiefel(shape) if wide else manifold
    with torch.no_grad():
        module.weight.copy_(source.double().sample())
    torch_parametrize.register_parametrization(module, "weight", manifold.double(), unsafe=True)
    return module


def chained(module: nn.Module, *links: nn.Module) -> nn.Module:
    """The module with links that never see its weight, which may lie off their manifolds."""
    for i, link in enumerate(links):
        torch_parametrize.register_parametrization(module, "weight", nn.Identity())
        module.parametrizations.weight[i] = link
    return module


SQUARE = ((5, 5), (2, 4, 4))
ANY = ((5, 5), (7, 3), (2, 3, 5))
CONV = (*ANY, (2, 2, 4, 3), (5, 1))
MAKERS = {
    "so": (SQUARE, lambda m, t: registered(geotorch.SO(m, t), *m)),
    "so_upper": (SQUARE, lambda m, t: registered(geotorch.SO(m, t, lower=False), *m)),
    "orthogonal": (CONV, lambda m, t: geotorch.orthogonal(of_shape(*m), "weight", t)),
    "grassmannian": (CONV, lambda m, t: geotorch.grassmannian(of_shape(*m), "weight", t)),
    "low_rank": (
        ANY,
        lambda m, t: geotorch.low_rank(of_shape(*m), "weight", min(2, *m[-2:]), t),
    ),
    "fixed_rank": (
        ANY,
        lambda m, t: geotorch.fixed_rank(of_shape(*m), "weight", min(2, *m[-2:]), triv=t),
    ),
    "almost_orthogonal": (
        ANY,
        lambda m, t: registered(geotorch.AlmostOrthogonal(m, 0.3, triv=t), *m),
    ),
    "invertible": (SQUARE, lambda m, t: geotorch.invertible(of_shape(*m), "weight", triv=t)),
    "sln": (SQUARE, lambda m, t: geotorch.sln(of_shape(*m), "weight", triv=t)),
    "psd": (SQUARE, lambda m, t: geotorch.positive_definite(of_shape(*m), "weight", triv=t)),
    "pssd": (SQUARE, lambda m, t: geotorch.positive_semidefinite(of_shape(*m), "weight", t)),
    "pssd_low_rank": (
        SQUARE,
        lambda m, t: geotorch.positive_semidefinite_low_rank(of_shape(*m), "weight", 2, t),
    ),
    "pssd_fixed_rank": (
        SQUARE,
        lambda m, t: geotorch.positive_semidefinite_fixed_rank(of_shape(*m), "weight", 2, triv=t),
    ),
    "symmetric_of_eigenvalues": (
        SQUARE,
        lambda m, t: registered(SymF(m, 2, (torch.sinh, torch.asinh), t), *m),
    ),
    "alpha_stable": (SQUARE, lambda m, t: registered(geotorch.Hurwitz(m, 0.1, t), *m)),
}
makers = pytest.mark.parametrize("name", MAKERS)
trivializations = pytest.mark.parametrize("triv", TRIVIALIZATIONS)


def moved(module: nn.Module, step: float = 0.3) -> nn.Module:
    """The module after a random step away from where it starts."""
    with torch.no_grad():
        for x in module.parameters():
            x.add_(torch.randn_like(x), alpha=step)
    return module


def value_and_gradients(module: nn.Module, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = module.weight
    xs = list(module.parametrizations.weight.parameters())
    return y.detach(), *torch.autograd.grad(y, xs, g.to(y.dtype))


@makers
@trivializations
def test_values_and_gradients_are_geotorchs(name, triv):
    for shape in MAKERS[name][0]:
        module = moved(MAKERS[name][1](shape, triv))
        g = torch.randn(shape, dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            plain = copy.deepcopy(module).to(dtype)
            twin = tp.fuse(copy.deepcopy(plain), strict=True)
            reference = value_and_gradients(copy.deepcopy(plain).double(), g)
            baseline = value_and_gradients(plain, g)
            tp.stats(reset=True)
            result = value_and_gradients(twin, g)
            assert tp.stats()["composed"] == 0
            assert tp.stats()["closed"] >= 1
            for x, base, exact in zip(result, baseline, reference, strict=True):
                assert (x.dtype, x.shape) == (dtype, exact.shape)
                size = torch.where(exact.norm() > g.norm(), exact.norm(), g.norm())
                mine, theirs = (float((z.double() - exact).norm() / size) for z in (x, base))
                # The fp64 reference is rounded like what it is compared with, in up to 3 factors.
                floor = 128 if dtype == torch.float64 else 8
                assert mine <= 3 * theirs + floor * torch.finfo(dtype).eps, shape


@makers
def test_what_is_assigned_is_geotorchs_bits(name):
    for shape in MAKERS[name][0][:2]:
        module = moved(MAKERS[name][1](shape, "cayley"))
        twin = tp.fuse(copy.deepcopy(module), strict=True)
        other = MAKERS[name][1](shape, "cayley").weight.detach()
        values = [other]
        if name != "alpha_stable":  # it takes eigenvalues, and oneMKL those of NaN by a crash
            values.append(torch.full_like(other, torch.nan))
        for value in values:
            before, outcomes = state(twin), []
            for m in (module, twin):
                torch.manual_seed(1)
                try:
                    m.weight = value
                except (ValueError, RuntimeError) as refused:
                    outcomes.append(f"{type(refused).__name__} {refused}")
            if outcomes:
                assert outcomes[0] == outcomes[1]
                assert_same_bits(before, state(twin))
            else:
                assert_same_bits(state(module), state(twin))


@pytest.mark.parametrize("name", ["so", "orthogonal", "low_rank", "psd"])
def test_the_base_can_be_updated(name):
    for shape in MAKERS[name][0][:2]:
        module = tp.fuse(moved(MAKERS[name][1](shape, "cayley")), strict=True)
        weight, before = module.weight.detach(), state(module)
        geotorch.update_base(module, "weight")
        assert torch.allclose(module.weight, weight, rtol=0, atol=1e-9)
        assert any(not torch.equal(before[k], v) for k, v in state(module).items())


@makers
def test_fifty_steps_are_geotorchs(name):
    torch.manual_seed(1)
    shape = MAKERS[name][0][1]  # a tall weight, or a batch of square ones
    module = moved(MAKERS[name][1](shape, "cayley"), 0.1)
    twin = tp.fuse(copy.deepcopy(module), strict=True)
    target, losses = torch.randn(shape, dtype=torch.float64), []
    for m in (module, twin):
        torch.manual_seed(2)
        tp.stats(reset=True)
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9)
        for step in range(50):
            optimizer.zero_grad()
            loss = (m.weight - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if step == 25 and hasattr(m.parametrizations.weight[0], "base"):
                geotorch.update_base(m, "weight")
    assert tp.stats()["composed"] == 0
    assert tp.stats()["closed"] >= 50
    theirs, ours = losses[:50], losses[50:]
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9)
    assert ours[-1] < ours[0]
    states = [state(m) for m in (module, twin)]
    assert list(states[0]) == list(states[1])
    for other in states:
        for m in (module, twin):
            m.load_state_dict(other)
        assert torch.allclose(twin.weight, module.weight, rtol=0, atol=1e-12)
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, rtol=1e-9, atol=1e-9), key


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("end", [tp.CayleyMap, tp.MatrixExponential])
@pytest.mark.parametrize("begin", ["Skew", "Symmetric"])
def test_a_triangle_before_a_map_of_ours(begin, end, lower):
    link = geotorch.Symmetric(lower) if begin == "Symmetric" else geotorch.Skew((4, 4), lower)
    module = chained(of_shape(2, 4, 4), link, end())
    g = torch.randn(2, 4, 4, dtype=torch.float64)
    expected = value_and_gradients(module, g)
    tp.fuse(module)
    tp.stats(reset=True)
    for x, y in zip(value_and_gradients(module, g), expected, strict=True):
        assert torch.allclose(x, y, atol=1e-12)
    # The Cayley map of a symmetric matrix is not orthogonal: that chain has no rule.
    path = "composed" if (begin, end) == ("Symmetric", tp.CayleyMap) else "closed"
    assert tp.stats()[path] == 1
    reason = tp.explain(module)[0].reason
    assert reason == (
        "geotorch's Symmetric has no fused form"
        if path == "composed"
        else "the original is on the cpu"
    )


@pytest.mark.parametrize(("begin", "sign"), [(geotorch.Skew, -1), (geotorch.Symmetric, 1)])
def test_kernels_take_both_triangles_together(begin, sign):
    pytest.importorskip("triton")
    size = [(3, 3)] if begin is geotorch.Skew else []
    links = [begin(*size, lower=lower) for lower in (True, False)]
    layers = [chained(of_shape(3, 3).float(), link, tp.MatrixExponential()) for link in links]
    model = tp.fuse(nn.ModuleList(layers), strict=True)
    with torch.no_grad():
        lower, upper = (x.parametrizations.weight.original for x in layers)
        upper.copy_(sign * lower.mT)
    with tp.use_path("kernel"), tp.cached(model):
        weights = [layer.weight for layer in layers]
    assert tp.stats()["kernel"] == 2
    for weight in weights:
        assert torch.allclose(weight, layers[0].weight, atol=1e-5)
    sum(weights).square().sum().backward()
    grads = [x.parametrizations.weight.original.grad for x in layers]
    assert torch.allclose(grads[1], sign * grads[0].mT, atol=1e-5)
    assert not grads[0].triu(1).any()


def test_registering_a_manifold_is_all_or_nothing():
    layer, manifold = nn.Linear(4, 5), geotorch.Stiefel((5, 4))
    before = layer.weight.detach().clone(), manifold.base.clone()
    with pytest.raises(ValueError, match="Tensor not contained in Stiefel"):
        tp.register_parametrization(layer, "weight", manifold)
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(manifold.base, before[1])
    nn.init.orthogonal_(layer.weight)
    value = layer.weight.detach().clone()
    tp.register_parametrization(layer, "weight", manifold)
    assert torch.allclose(layer.weight, value, atol=1e-6)
    assert tp.explain(layer)[0].path == "closed"


def custom(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_exp(2 * x)


def test_what_declines_names_the_class():
    shape = (4, 4)
    cases = (
        (geotorch.Skew(shape), "geotorch's Skew has no fused form"),
        (geotorch.Symmetric(), "geotorch's Symmetric has no fused form"),
        (geotorch.Sphere(shape), "geotorch's Sphere has no fused form"),
        (geotorch.SphereEmbedded(shape), "geotorch's SphereEmbedded has no fused form"),
        (geotorch.Rn(shape), "geotorch's Rn has no fused form"),
        (geotorch.ProductManifold([]), "geotorch's ProductManifold has no fused form"),
        (geotorch.SO(shape, custom), "SO has a trivialization that is not geotorch's, custom"),
        (geotorch.PSD(shape, triv=custom), "Stiefel has a trivialization that is not geotorch's"),
        (geotorch.Stiefel((5, 4)), "the base does not fit the original"),
        (geotorch.LowRank((5, 4), 2), "LowRank is of another shape than the original"),
    )
    for link, reason in cases:
        row = tp.explain(tp.fuse(chained(of_shape(*shape).float(), link)))[0]
        assert row.path == "composed"
        assert row.reason.startswith(reason)
    wide = tp.fuse(geotorch.orthogonal(of_shape(4, 4)))
    stiefel = wide.parametrizations.weight[0]
    stiefel.transposed = True
    assert tp.explain(wide)[0].reason == "Stiefel is of another shape than the original"
    stiefel.transposed = False
    stiefel.base = stiefel.base.float()
    assert tp.explain(wide)[0].reason == "the base has not the original's device and dtype"


def test_a_part_with_hooks_or_of_another_class_declines():
    layer = tp.fuse(geotorch.low_rank(of_shape(5, 4), "weight", 2), strict=True)
    link = layer.parametrizations.weight[0]
    handle = link[0].register_forward_hook(lambda *args: None)
    assert "hooks" in tp.explain(layer)[0].reason
    handle.remove()

    class Mine(geotorch.Stiefel):
        pass

    link[2] = Mine((4, 2)).double()
    assert tp.explain(layer)[0].reason == "a part of it is a Mine"
    other = tp.fuse(chained(of_shape(4, 4), Mine((4, 4))))
    assert tp.explain(other)[0].reason == "no rule for this chain"


@pytest.mark.parametrize("triv", TRIVIALIZATIONS)
def test_nothing_as_large_as_the_base_is_made(triv):
    orthogonal = geotorch.orthogonal(of_shape(200, 4), triv=triv)
    low_rank = geotorch.low_rank(of_shape(200, 150), "weight", 2, triv)
    for module, most in ((orthogonal, 200 * 8), (low_rank, 200 * 150)):
        tp.fuse(module, strict=True)
        with Largest() as largest:
            module.weight.sum().backward()
        assert largest.entries <= most
    with tp.use_path("composed"), Largest() as largest:
        orthogonal.weight
    assert largest.entries >= 200 * 200


def test_compile_fullgraph():
    torch.compiler.reset()
    for make in (geotorch.orthogonal, geotorch.positive_definite):
        module = tp.fuse(moved(make(of_shape(4, 4), triv="cayley")), strict=True)
        compiled = torch.compile(lambda m=module: m.weight.cos(), fullgraph=True, backend="eager")
        assert torch.allclose(compiled(), module.weight.cos())


def test_geotorch_is_not_imported_for_the_user():
    code = "import sys, torch, tritonparam as tp; tp.fuse(tp.orthogonal(torch.nn.Linear(2, 2)))"
    code += "; assert 'geotorch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("version", "why"), [("0.3.0", "it is older"), ("0.9", ".* has no attribute 'so'"), ("", "")]
)
def test_another_geotorch_declines(version, why, monkeypatch):
    other = types.SimpleNamespace(__version__=version, Stiefel=geotorch.Stiefel)
    monkeypatch.setitem(sys.modules, "geotorch", other)
    monkeypatch.setattr(interop, "found", ())
    module = tp.fuse(geotorch.orthogonal(of_shape(4, 4)))
    reason = tp.explain(module)[0].reason
    assert re.match(rf"geotorch {version} is not like 0\.4, which is known: {why}", reason)
