"""explain(model) as a table and as data, and `python -m tritonparam explain`."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations as theirs

import tritonparam as tp
from tritonparam import configs


def chain(layer: nn.Module, *links: nn.Module, name: str = "weight") -> nn.Module:
    return tp.register_parametrization(layer, name, *links)


def randn(*shape: int) -> nn.Module:
    torch.manual_seed(6)
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.randn(shape))
    return layer


MASK = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
# What makes a weight, and what its error is.
ERRORS = {
    "cayley": (lambda: chain(randn(4, 4), tp.Skew(), tp.CayleyMap()), "orthogonal"),
    "skew_exp": (lambda: chain(randn(2, 3, 3), tp.Skew(), tp.MatrixExponential()), "orthogonal"),
    "wide": (lambda: tp.orthogonal(randn(3, 5)), "orthogonal"),
    "torchs": (lambda: theirs.orthogonal(randn(5, 3)), "orthogonal"),
    "spd": (lambda: chain(randn(3, 3), tp.Symmetric(), tp.MatrixExponential()), "symmetric"),
    "symmetric": (lambda: tp.symmetric(randn(3, 3)), "symmetric"),
    "skew": (lambda: tp.skew(randn(3, 3)), "skew"),
    "spectral": (lambda: tp.spectral_norm(randn(4, 3, 2), dim=1), "spectral"),
    "vector": (lambda: tp.spectral_norm(randn(7)), "spectral"),
    "weight_norm": (lambda: tp.weight_norm(randn(4, 3, 2), dim=-2), "norms"),
    "one_norm": (lambda: tp.weight_norm(randn(4, 3), dim=None), "norms"),
    "pruned": (lambda: chain(randn(2, 2), tp.Skew(), tp.CayleyMap(), tp.Pruning(MASK)), "mask"),
    "no_constraint": (lambda: chain(randn(3, 3), tp.MatrixExponential()), None),
}


def measured(kind: str, layer: nn.Module, w: torch.Tensor) -> float:
    """The error by another formula than explain's."""
    w = w.double()
    if kind == "orthogonal":
        gram = torch.einsum("...ij,...ik->...jk", w, w)
        if w.size(-2) < w.size(-1):
            gram = torch.einsum("...ij,...kj->...ik", w, w)
        d = gram - torch.eye(gram.size(-1), dtype=w.dtype)
    elif kind in ("symmetric", "skew"):
        d = w - w.transpose(-1, -2) * (1 if kind == "symmetric" else -1)
    elif kind == "spectral":
        matrix = w.transpose(0, 1).reshape(w.size(1), -1) if w.dim() > 1 else w[None]
        d = torch.linalg.svdvals(matrix)[0] - 1
    elif kind == "norms":
        g = layer.parametrizations.weight.original0.detach().double()
        d = (w.norm() if g.dim() == 0 else w.norm(dim=(0, 2), keepdim=True)) - g.abs()
    else:
        d = w[MASK == 0]
    return float(d.abs().max())


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    make, kind = ERRORS[name]
    layer = make().train()
    with torch.no_grad():  # far from what was registered
        for p in layer.parameters():
            p.mul_(1.5)
        for key, buffer in layer.named_buffers():
            if key.endswith(("_u", "_v")):
                nn.functional.normalize(torch.randn_like(buffer), dim=0, out=buffer)
    state, random = deepcopy(layer.state_dict()), torch.get_rng_state()
    row = tp.explain(layer, errors=True)[0]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(x, state[key]) for key, x in layer.state_dict().items())
    assert all(m.training for m in layer.modules())
    assert tp.explain(layer)[0].error is None
    if kind is None:
        assert row.error is None
        return
    expected = measured(kind, layer, layer.eval().weight.detach())
    assert row.error == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert (row.error > 0.01) == (name == "spectral")  # u and v are random


def test_a_broken_constraint_is_seen():
    layer = theirs.orthogonal(randn(3, 3), orthogonal_map="householder")
    with torch.no_grad():
        layer.parametrizations.weight[0].base.mul_(2)
    assert tp.explain(layer, errors=True)[0].error == pytest.approx(3, abs=1e-5)
    spectral = tp.spectral_norm(nn.Linear(3, 3))
    with torch.no_grad():
        spectral.parametrizations.weight.original.fill_(torch.nan)
    row = tp.explain(spectral, errors=True)[0]
    assert row.error != row.error
    assert "nan" in str(tp.explain(spectral, errors=True))
    assert tp.explain(tp.skew(nn.Linear(3, 3)).to("meta"), errors=True)[0].error is None


def test_the_table_fits_80_columns():
    layers = {name: make() for name, (make, _) in ERRORS.items()}
    layers["hook"] = utils.spectral_norm(nn.Linear(3, 3))
    model = nn.ModuleDict(layers)
    short = str(tp.explain(model))
    assert "cayley.weight" in short.splitlines()[1]
    assert "closed [1]" in short.splitlines()[1]
    assert short.count("the original is on the cpu") == 2  # alone, and with the pruned one
    nested = nn.Sequential(nn.ModuleDict({"a_generator_of_images_of_many_sizes": model}))
    long = str(tp.explain(nested, errors=True))
    for text in (short, long):
        assert max(map(len, text.splitlines())) <= 80
        for row in tp.explain(model):
            assert "→".join(row.chain) in text
            assert row.name in text
    lines = long.splitlines()
    at = next(i for i, line in enumerate(lines) if line.endswith("cayley.weight  Skew→CayleyMap"))
    assert lines[at + 1].split()[:4] == ["4×4", "float32", "closed", "[1]"]
    assert float(lines[at + 1].split()[4]) < 1e-5


def tall(shape: tuple[int, ...], orthogonal_map: str, based: bool = True) -> nn.Module:
    return tp.orthogonal(randn(*shape), "weight", orthogonal_map, use_trivialization=based)


KERNELS = {
    "cayley": lambda: chain(randn(2, 5, 5), tp.Skew(), tp.CayleyMap()),
    "cayley_products": lambda: chain(randn(70, 70), tp.Skew(), tp.CayleyMap()),
    "cayley_bf16": lambda: chain(randn(70, 70), tp.Skew(), tp.CayleyMap()).bfloat16(),
    "cayley_empty": lambda: chain(randn(0, 3, 3), tp.Skew(), tp.CayleyMap()),
    "skew_exp": lambda: chain(randn(5, 5), tp.Skew(), tp.MatrixExponential()),
    "skew_exp_scratch": lambda: chain(randn(40, 40), tp.Skew(), tp.MatrixExponential()),
    "skew_exp_products": lambda: chain(randn(70, 70), tp.Skew(), tp.MatrixExponential()),
    "skew_exp_fp64": lambda: chain(randn(5, 5), tp.Skew(), tp.MatrixExponential()).double(),
    "symmetric_exp": lambda: tp.spd(randn(5, 5)),
    "symmetric_exp_products": lambda: tp.spd(randn(70, 70)),
    "symmetric_exp_fp64": lambda: tp.spd(randn(5, 5)).double(),
    "orthogonal": lambda: tp.orthogonal(randn(6, 6)),
    "orthogonal_wide_fp64": lambda: tp.orthogonal(randn(6, 6)).double(),
    **{
        f"tall_{name}_{k}_{based}": partial(tall, (k + 70, k), name, based)
        for name in ("cayley", "matrix_exp", "householder")
        for k in (5, 16, 17)
        for based in (False, True)
    },
    "wide": partial(tall, (3, 6), "matrix_exp"),
    "householder_square": partial(tall, (6, 6), "householder"),
    "householder_torchs": lambda: tp.fuse(theirs.orthogonal(randn(6, 4), "weight", "householder")),
    "tall_empty": partial(tall, (0, 5, 3), "cayley"),
    "spectral": lambda: tp.spectral_norm(randn(5, 3)),
    "spectral_eval": lambda: tp.spectral_norm(randn(5, 3)).eval(),
    "spectral_steps": lambda: tp.spectral_norm(randn(5, 3, 2), n_power_iterations=3),
    "spectral_stepped": lambda: tp.spectral_norm(randn(5, 3), iterate="step"),
    "weight_norm": lambda: tp.weight_norm(randn(5, 3, 2), dim=1),
    "weight_norm_long": lambda: tp.weight_norm(randn(2, 40000)),
    "pruned": lambda: chain(randn(5, 5), tp.Skew(), tp.CayleyMap(), tp.Pruning(torch.ones(5, 5))),
}


@pytest.fixture
def count(monkeypatch):
    """Of launches, where Triton's interpreter would run one; what is computed does not matter."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    count = [0]

    def launch(self, *args, **kwargs):
        count[0] += 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    return count


@pytest.mark.parametrize("name", KERNELS)
def test_launches_are_those_of_the_launchers(name, count):
    layer = KERNELS[name]()
    with tp.use_path("kernel"):
        row = tp.explain(layer)[0]
        assert count == [0]
        weight = layer.weight
        forward = count[0]
        weight.sum().backward()
        assert row.launches == (forward, count[0] - forward)
        assert row.path == "kernel"
        assert count[0] > 0 or name.endswith("_empty")
        text = str(tp.explain(layer))
        assert "launches" in text
        assert "{} + {}".format(*row.launches) in text
    assert tp.explain(layer)[0].launches is None


@pytest.mark.parametrize("name", ["cayley", "skew_exp", "symmetric_exp"])
def test_launches_of_a_tuned_configuration(name, count):
    """Of rounds in one launch."""
    before = tp.Symmetric() if name == "symmetric_exp" else tp.Skew()
    after = tp.CayleyMap() if name == "cayley" else tp.MatrixExponential()
    layer = chain(randn(70, 70), before, after)
    row = {"device": configs.device_name(torch.device("cpu")), "dtype": "float32", "chain": name}
    phases = {phase: {"programs": 3} for phase in ("fwd", "bwd")}
    row |= {"n": 70, "batch": 1, "path": "kernel", "config": phases}
    with tp.use_path("kernel"):
        (usual,) = tp.explain(layer)
        with configs.trying(row):
            (tuned,) = tp.explain(layer)
            weight = layer.weight
            forward = count[0]
            weight.sum().backward()
    assert tuned.launches == (forward, count[0] - forward)
    assert sum(tuned.launches) < sum(usual.launches) - 20


def test_a_path_that_is_set(monkeypatch):
    layer = chain(randn(3, 3), tp.Skew(), tp.CayleyMap())
    for path in ("closed", "composed"):
        monkeypatch.setattr(tp.paths, "_override", path)  # as TRITONPARAM_PATH does
        row = tp.explain(layer)[0]
        assert (row.path, row.launches) == (path, None)
        tp.stats(reset=True)
        layer.weight
        assert tp.stats()[path] == 1


MODELS = """
import torch, tritonparam as tp
from torch import nn

def plain():
    return nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))

def legacy():
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 3)))

def broken():
    model = tp.spectral_norm(nn.Linear(4, 3))
    nn.init.constant_(model.parametrizations.weight.original, float("nan"))
    return model

def nothing():
    return 3

def fails():
    raise LookupError("no data here")

def wide(width):
    return nn.Linear(width, width)

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

made = tp.skew(Net())
number = 3
"""


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tritonparam import cli

    (tmp_path / "gan_models.py").write_text(MODELS)
    (tmp_path / "gan_broken.py").write_text("import a_module_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("gan_models", "gan_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return lambda *args: CliRunner().invoke(cli.application(), ["explain", *args])


def test_command_line(invoke):
    result = invoke("gan_models:plain")
    assert result.exit_code == 0, result.output
    assert "0.weight  _SpectralNorm  3×4    float32  composed [1]" in result.stdout
    assert "[1] not fused yet; call tritonparam.fuse(model)" in result.stdout
    assert invoke("gan_models:plain", "--strict").exit_code == 1
    result = invoke("gan_models:plain", "--fuse", "--strict", "--errors", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["weights"]
    error = row.pop("error")
    assert 0 <= error < 1e-3
    assert row == {
        "name": "0.weight",
        "chain": ["_SpectralNorm"],
        "shape": [3, 4],
        "dtype": "float32",
        "path": "closed",
        "reason": "the original is on the cpu",
        "launches": None,
    }
    assert "SpectralNorm" in invoke("gan_models:legacy").stdout
    assert "closed" in invoke("gan_models:legacy", "--fuse", "--legacy").stdout
    assert json.loads(invoke("gan_models:Net", "--json").stdout) == {"weights": []}
    assert "Skew" in invoke("gan_models:made").stdout
    broken = json.loads(invoke("gan_models:broken", "--errors", "--json").stdout)
    assert broken["weights"][0]["error"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gan_models"], "must be named as module:callable, got 'gan_models'"),
        (["gan_missing:f"], "there is no module 'gan_missing' here"),
        (["gan_models.deeper:f"], "there is no module"),
        (["gan_models:missing"], "gan_models has no 'missing'"),
        (["gan_models:number"], "gan_models:number must be callable, got a int"),
        (["gan_models:nothing"], "gan_models:nothing must return an nn.Module, got a int"),
        (["./gan_models:plain"], "must be named as module:callable, got './gan_models:plain'"),
        (["gan_models:wide"], "callable without arguments, but is missing a required"),
        (["gan_models:plain", "--legacy"], "--legacy needs --fuse"),
    ],
)
def test_bad_arguments_are_one_sentence(invoke, arguments, sentence):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.replace("│", " ").split())
    assert result.stdout == ""


def test_errors_of_the_users_own_code_are_passed_on(invoke):
    result = invoke("gan_models:fails")
    assert result.exit_code == 1
    assert isinstance(result.exception, LookupError)
    result = invoke("gan_broken:f")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "a_module_that_is_not_there"
