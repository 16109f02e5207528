"""Every refusal by its sentence: those that the tests of their own subjects do not quote."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils.parametrize import ParametrizationList

import tritonparam as tp
from tritonparam import declared, info, logm, ops, paths, registry, report, rules, trials
from tritonparam.orthogonal_maps import map_declines
from tritonparam.reading import too_far

EYE = torch.eye(2, dtype=torch.float64)


def cayley_layer(n: int = 3) -> nn.Module:
    return tp.register_parametrization(nn.Linear(n, n), "weight", tp.Skew(), tp.CayleyMap())


def load_base(base: torch.Tensor) -> None:
    layer = tp.orthogonal(nn.Linear(3, 3))
    key = "parametrizations.weight.0.base"
    layer.load_state_dict({**layer.state_dict(), key: base})


ERRORS = {
    "log of an indefinite matrix": (
        lambda: logm.symmetric(torch.diag(torch.tensor([1.0, -2.0]))),
        ValueError,
        "a symmetric matrix with eigenvalue -2.0e+00",
    ),
    "log of a reflection": (
        lambda: logm.orthogonal(EYE.flip(0)),
        ValueError,
        "an orthogonal matrix with determinant -1",
    ),
    "log of a negative eigenvalue": (
        lambda: logm.general(torch.tensor([[-1.0, 5.0], [0.0, 2.0]]).double(), 1e-12),
        ValueError,
        "a matrix with eigenvalue -1.0e+00",
    ),
    "log to no tolerance": (
        lambda: logm.general(torch.matrix_exp(EYE + EYE.flip(0)) + 0.1 * EYE.triu(), -1.0),
        ValueError,
        "a matrix whose logarithm could be computed only to ",
    ),
    "no entries": (
        lambda: tp.Skew().right_inverse(torch.empty(2, 2, device="meta")),
        tp.NoPreimage,
        "Skew: the assigned value is on the meta device and has no entries.",
    ),
    "a complex rotation": (
        lambda: tp.CayleyMap().right_inverse(EYE.to(torch.cdouble)),
        tp.NoPreimage,
        "CayleyMap: only real matrices can be assigned, got a complex one.",
    ),
    "a complex exponential": (
        lambda: tp.MatrixExponential().right_inverse(EYE.to(torch.cdouble)),
        tp.NoPreimage,
        "MatrixExponential: only real matrices can be assigned, got a complex one.",
    ),
    "a base that is not orthonormal": (
        lambda: load_base(2 * torch.eye(3)),
        RuntimeError,
        "Orthogonal: parametrizations.weight.0.base must be orthonormal, got shape [3, 3]; "
        "checkpoints of torch's orthogonal() for tall weights hold an n×n base and load into a "
        "model that torch constrained, which fuse() then speeds up.",
    ),
    "a base of another shape": (
        lambda: load_base(torch.eye(4)),
        RuntimeError,
        "Orthogonal: parametrizations.weight.0.base must be of shape [3, 3], got shape [4, 4]; ",
    ),
    "removal of what is not there": (
        lambda: tp.remove_parametrizations(cayley_layer(), "bias"),
        ValueError,
        "remove_parametrizations: tensor_name must name a parametrized tensor of "
        "ParametrizedLinear, got 'bias'; it has weight.",
    ),
    "gates of what has none": (
        lambda: tp.orthogonal_gates(nn.Linear(3, 3), "weight"),
        TypeError,
        "orthogonal_gates: the module must be an nn.RNN, nn.GRU, nn.LSTM or one of their cells, "
        "got Linear; orthogonal(module, name) constrains any other weight.",
    ),
    "tuning without a table": (
        lambda: tp.tune(cayley_layer()),
        ValueError,
        "tune: there is no table to write to, since TRITONPARAM_CACHE_DIR is empty; set "
        "TRITONPARAM_CACHE_DIR to a folder of yours or pass file=.",
    ),
    "--target alone": (
        lambda: info.report(targets=["sm_90"]),
        ValueError,
        "--target needs --kernels: it says what kernels are compiled for.",
    ),
    "--legacy alone": (
        lambda: report.rows("json:dumps", legacy=True),
        ValueError,
        "--legacy needs --fuse: it says what is converted then.",
    ),
    "--static with a model": (
        lambda: report.tunings("json:dumps", static=True),
        ValueError,
        "--static only compiles: it goes with --chain, --n, --dtype and --target.",
    ),
    "a function that is not there": (
        lambda: report.build("json:nothing"),
        ValueError,
        "json has no 'nothing'; the model is named as module:callable.",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what):
    refused, kind, sentence = ERRORS[what]
    with pytest.raises(kind, match=re.escape(sentence)):
        refused()


def test_a_matrix_that_is_singular_to_rounding(monkeypatch):
    def singular(a):
        return torch.linalg.inv(torch.zeros_like(a))

    monkeypatch.setattr(logm, "_square_root", singular)
    with pytest.raises(ValueError, match="^a matrix that is singular to rounding$"):
        logm.general(torch.tensor([[2.0, 5.0], [0.0, 3.0]]).double(), 1e-12)


def reason(layer: nn.Module) -> str:
    (row,) = tp.explain(layer)
    assert row.path == "composed"
    return row.reason


def with_dim(dim: int) -> nn.Module:
    layer = tp.fuse(theirs.weight_norm(nn.Linear(3, 4)))
    layer.parametrizations.weight[0].dim = dim
    return layer


def behind_another_link() -> nn.Module:
    layer = tp.register_parametrization(nn.Linear(3, 4), "weight", nn.Identity())
    return tp.fuse(theirs.weight_norm(layer))


def hooked() -> nn.Module:
    layer = cayley_layer()
    layer.parametrizations.weight[1].register_forward_pre_hook(lambda *args: None)
    return layer


def kept_elsewhere() -> nn.Module:
    class Kept(ParametrizationList):
        pass

    layer = tp.unfuse(cayley_layer())
    layer.parametrizations.weight.__class__ = Kept
    return layer


REASONS = {
    "hooks": (hooked, "a link has hooks, which a fused chain would skip"),
    "norms of another shape": (lambda: with_dim(1), "the norms have another shape"),
    "norms of another dim": (lambda: with_dim(2), "the norms do not fit the directions"),
    "norms of what no norms are known of": (
        behind_another_link,
        "weight norm is not the first link, which gets norms and directions",
    ),
    "another list": (
        kept_elsewhere,
        "it is kept in a Kept, not in torch's ParametrizationList",
    ),
}


@pytest.mark.parametrize("what", REASONS)
def test_reasons(what):
    make, sentence = REASONS[what]
    assert reason(make()) == sentence


@pytest.mark.parametrize("chain", ["cayley", "skew_exp", "symmetric_exp", "matrix_exp"])
def test_what_is_not_square(chain):
    (rule,) = [rule for rule in rules.RULES if rule.name == chain]
    links = [link() for link in rule.chain]
    assert rule.declines(links, torch.ones(2, 3)) == "the original is not square"
    assert rule.declines(links, torch.ones(3)) == "the original is not square"


def test_what_is_no_matrix_and_what_has_no_fp64():
    assert map_declines("cayley", torch.ones(3)) == "the original is not a matrix"
    elsewhere = SimpleNamespace(dim=lambda: 2, device=SimpleNamespace(type="mps"))
    for name in ("cayley", "householder"):
        declined = map_declines(name, elsewhere)
        assert declined == "the map needs fp64 inside, which the device has not"
    assert map_declines("matrix_exp", elsewhere) == ""


def test_the_upper_triangle_of_a_tall_manifold():
    geotorch = pytest.importorskip("geotorch", minversion="0.4")
    layer = tp.fuse(geotorch.orthogonal(nn.Linear(4, 5)))
    layer.parametrizations.weight[0].lower = False
    assert reason(layer) == "Stiefel takes the upper triangle"


def test_transforms_that_no_chain_is_fused_in():
    layer, found = cayley_layer(), []
    plist = layer.parametrizations.weight

    def look(x):
        xs = (plist.original,)
        found.append(registry.lookup(declared.table(), tuple(plist), xs)[2])
        return x.sum()

    torch.func.grad(look)(torch.ones(1))
    torch.jit.trace(look, torch.ones(1), check_trace=False)
    with forward_ad.dual_level():
        look(torch.ones(1))
    assert found[0] == "a torch.func transform is active"
    assert set(found[1:-1]) == {"torch.jit.trace records the links"}
    assert found[-1] == "forward-mode differentiation is active"


def test_what_kernels_do_not_take(device):
    pytest.importorskip("triton")
    w, g = torch.ones(4, 3, device=device), torch.ones(4, 1, device=device)
    u, v = torch.ones(4, device=device), torch.ones(3, device=device)
    spectral = ops.spectral_norm._declines
    with tp.use_path("kernel"):
        assert spectral(w, u, v) == ""
        assert spectral(w, u, torch.ones(6, device=device)[::2]) == "u or v is not contiguous"
        assert spectral(w[:0], u[:0], v) == "the original is empty"
        assert spectral(u) == "the original is a vector"
        assert ops.weight_norm.kernel_declines(g[:0], w[:0]) == "the original is empty"
        assert paths.no_kernel(w) == "this chain has no kernel yet"
        with pytest.raises(RuntimeError, match="cannot run because this chain has no kernel yet"):
            tp.functional.matrix_exp(torch.eye(3, device=device))


def test_what_candidates_are_discarded_for():
    pytest.importorskip("triton")
    spilled = {"stack": 8, "shared": 0}
    assert trials._too_much(spilled, "sm_90") == "it spills 8 bytes of registers"
    weight = object.__new__(trials.Weight)
    weight._expected = [torch.ones(2, dtype=torch.float64)]
    errors = weight.compared([torch.zeros(2)])
    assert too_far(errors, torch.float32) == "its value is off by 1e+00"
