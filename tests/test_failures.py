"""A kernel that Triton cannot compile: one warning for the chain, and the closed form."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

import tritonparam as tp
from tritonparam import failures, kernels, paths

RESOURCES = OutOfResources(300_000, 232_448, "shared memory")
# The chain, its layer, and the kernels of its passes.
CHAINS = {
    "cayley": (
        lambda n: tp.register_parametrization(linear(n), "weight", tp.Skew(), tp.CayleyMap()),
        ("cayley", "cayley_fwd_kernel", "_cayley_bwd_small_kernel"),
    ),
    "skew_exp": (
        lambda n: tp.register_parametrization(
            linear(n), "weight", tp.Skew(), tp.MatrixExponential()
        ),
        ("expm", "_expm_fwd_kernel", "_expm_bwd_kernel"),
    ),
    "symmetric_exp": (
        lambda n: tp.spd(linear(n)),
        ("expm", "_expm_fwd_kernel", "_expm_bwd_kernel"),
    ),
    "spectral_norm": (
        lambda n: tp.spectral_norm(linear(n)),
        ("spectral_norm", "_spectral_norm_fwd_kernel", "_spectral_norm_bwd_kernel"),
    ),
    "weight_norm": (
        lambda n: tp.weight_norm(linear(n)),
        ("weight_norm", "_weight_norm_fwd_kernel", "_weight_norm_bwd_kernel"),
    ),
}
CURVE = ("curve", "value", "gradient")
TALL = {
    "tall_cayley": ("cayley", CURVE),
    "tall_exp": ("matrix_exp", CURVE),
    "householder": ("householder", ("householder", "householder_fwd", "householder_bwd")),
}


def tall(orthogonal_map: str, based: bool):
    def make(n: int) -> nn.Module:
        layer = linear(n, n + 3)
        return tp.orthogonal(layer, "weight", orthogonal_map, use_trivialization=based)

    return make


for _name, (_map, _kernels) in TALL.items():
    CHAINS[_name] = tall(_map, True), _kernels
    CHAINS[f"{_name} free"] = tall(_map, False), _kernels


def linear(n: int, rows: int | None = None) -> nn.Module:
    torch.manual_seed(4)
    return nn.Linear(n, rows or n, bias=False)


class Failing:
    """In the place of a kernel, or of a function that launches some: it raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error, self.launches, self.arg_names = error, 0, ()

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        self.launches += 1
        raise self.error


@pytest.fixture(autouse=True)
def _kernels_are_tried(monkeypatch):
    """As on a GPU, without asking for a path; in the interpreter on the CPU."""
    monkeypatch.setattr(paths, "device_declines", lambda x: "")
    monkeypatch.setattr(paths, "on_cpu", lambda x: False)
    monkeypatch.setattr(failures, "_causes", {})
    monkeypatch.setattr(failures, "_warned", set())


def fail(monkeypatch, chain: str, phase: int, error: Exception) -> Failing:
    file, *names = CHAINS[chain][1]
    failing = Failing(error)
    monkeypatch.setattr(getattr(kernels, file), names[phase], failing)
    return failing


def step(layer: nn.Module) -> list[torch.Tensor]:
    """The weight, the gradients of its originals, and the buffers after a read."""
    weight = layer.weight
    g = torch.arange(weight.numel(), dtype=weight.dtype).view(weight.shape).cos()
    gradients = torch.autograd.grad(weight, list(layer.parameters()), g)
    return [weight.detach(), *gradients, *(b.clone() for b in layer.buffers())]


for _file in {files[0] for _, files in CHAINS.values()}:
    paths.kernels(_file)


@pytest.mark.parametrize("phase", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("chain", CHAINS)
def test_the_closed_form_takes_over(monkeypatch, chain, phase):
    make = CHAINS[chain][0]
    with tp.use_path("closed"):
        expected = step(make(5))
    failing = fail(monkeypatch, chain, phase, RESOURCES)
    layer = make(5)
    tp.stats(reset=True)
    name = chain.removesuffix(" free")
    with pytest.warns(UserWarning, match=f"{name}: Triton cannot compile") as caught:
        got = step(layer)
    caught = [x for x in caught if x.category is UserWarning]  # numpy warns of the log of 0
    assert len(caught) == 1
    assert "OutOfResources: out of resource: shared memory, Required: 300000" in str(
        caught[0].message
    )
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    first = ("closed", "kernel")[phase]
    assert tp.stats(reset=True)[first] == 1
    assert failing.launches == 1

    row = tp.explain(layer)[0]
    assert (row.path, row.launches) == ("closed", None)
    assert row.reason.startswith("Triton cannot compile its kernel here (OutOfResources: out of")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(layer)
        step(make(6))  # told already, but it tries: another size may fit
    assert failing.launches == 2
    assert tp.stats()["closed"] == (2, 1)[phase]


COMPILERS = [
    CompilationError("x = 1\ny = 2", type("Node", (), {"lineno": 2, "col_offset": 0})(), "no such"),
    PTXASError("ptxas fatal"),
    RuntimeError("PassManager::run failed"),
]
NO_ROOM = RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
PROGRAMMERS = [
    TypeError("wrong argument"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    InterpreterError("index out of range"),
    torch.OutOfMemoryError("out of memory"),
]


@pytest.mark.parametrize("error", COMPILERS, ids=lambda e: type(e).__name__)
def test_what_a_compiler_says(monkeypatch, error):
    fail(monkeypatch, "cayley", 0, error)
    layer = CHAINS["cayley"][0](5)
    with pytest.warns(UserWarning, match="Triton cannot compile the kernel for float32, n = 5"):
        layer.weight
    message = str(error).splitlines()[-1].split(": ")[-1]
    assert message in tp.explain(layer)[0].reason


def test_a_tuned_row_that_has_no_room_is_to_be_tuned_again(monkeypatch):
    fail(monkeypatch, "cayley", 0, NO_ROOM)
    layer = CHAINS["cayley"][0](5)
    with pytest.warns(UserWarning, match="no room for the tuned configuration for float32, n = 5"):
        layer.weight
    assert tp.explain(layer)[0].reason == (
        f"the device has no room for its tuned configuration here (RuntimeError: {NO_ROOM}); "
        "`python -m tritonparam tune --again` finds a configuration that fits"
    )


@pytest.mark.parametrize("phase", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("error", PROGRAMMERS, ids=lambda e: type(e).__name__)
def test_other_errors_are_raised(monkeypatch, error, phase):
    # The tall ones share one way to launch, and take the interpreter long.
    chains = CHAINS if error is PROGRAMMERS[0] else list(CHAINS)[: -2 * len(TALL)]
    layers = {chain: CHAINS[chain][0](5) for chain in chains}
    for chain, layer in layers.items():
        fail(monkeypatch, chain, phase, error)
        before = [b.clone() for b in layer.buffers()]
        with pytest.raises(type(error)) as raised:
            step(layer)
        assert raised.value is error
        for buffer, old in zip(layer.buffers(), before, strict=True):
            assert phase or torch.equal(buffer, old)
    assert not failures._causes


def test_a_path_that_is_asked_for_has_no_way_out(monkeypatch):
    layer = CHAINS["cayley"][0](5)
    fail(monkeypatch, "cayley", 0, RESOURCES)
    with tp.use_path("kernel"), pytest.raises(OutOfResources):
        layer.weight


def test_compilers_real_errors_are_told_apart():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    for function in (unsupported, refused):
        source = ASTSource(fn=JITFunction(function), signature={"x_ptr": "*fp32"}, constexprs={})
        with pytest.raises(Exception) as raised:  # noqa: PT011
            triton.compile(source, GPUTarget("cuda", 90, 32), {"enable_fp_fusion": True})
        assert kernels.cannot_compile(raised.value), raised.value


def unsupported(x_ptr):
    with x_ptr:
        pass


def refused(x_ptr):
    tl.static_assert(False, "too large")
