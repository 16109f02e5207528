"""What the tuner tries: candidates, launched as they are, and why some are discarded."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import tritonparam as tp
from tests.test_tuner import cayley
from tests.test_tuner import few_rounds as few_rounds
from tests.test_tuner import file as file
from tritonparam import paths, samples, trials
from tritonparam.trials import Trial

TALL = ("tall_cayley", "tall_exp", "householder")


SIZES = [(c, n) for c in samples.SQUARE[:3] + TALL for n in (3, 16, 32, 48, 64, 200, 1000)]
SIZES += [(c, n) for c in ("spectral_norm", "weight_norm") for n in (1, 64 * 27, 512 * 4608)]


@pytest.mark.parametrize(("chain", "n"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_candidates_are_different_and_begin_with_the_default(chain, n, dtype):
    pytest.importorskip("triton")
    if n == 1000 and chain in TALL:
        with pytest.raises(ValueError, match=f"{chain} has no launch configurations .* n = 1000"):
            trials.Problem(chain, n, dtype, "sm_90")
        return
    for target in ("sm_90", "gfx942"):
        problem = trials.Problem(chain, n, dtype, target)
        found = trials.candidates(problem)
        assert found[0] == Trial("kernel", {})
        assert 4 <= len(found) <= 60
        for trial in found[1:]:
            ((phase, numbers),) = trial.config.items()
            default = problem.candidates(phase)[0]
            assert replace(default, **numbers) != default
            assert problem.launches(phase, numbers)
        assert len({str(trial) for trial in found}) == len(found)


def test_kernels_are_launched_with_what_is_tried(file, monkeypatch):
    kernels = pytest.importorskip("tritonparam.kernels.cayley")
    slow = kernels.fwd_config(4, torch.float32)
    launched = []
    for name in ("cayley_fwd", "cayley_bwd"):
        launch = getattr(kernels, name)

        def record(*args, launch=launch):
            launched.append(args[-1])
            return launch(*args)

        monkeypatch.setattr(kernels, name, record)

    def measure(step):
        launched.clear()
        step()
        if len(launched) != 2:
            return 1e-6
        fwd, bwd = launched
        return 1e-5 * (1 if fwd.block_matrices == 1 else 3) + 1e-5 * bwd.num_warps**-1

    monkeypatch.setattr(trials, "compiled", lambda found, problem: found)
    layer = cayley().to("cuda" if torch.cuda.is_available() else "cpu")
    with tp.use_path("kernel"):
        (found,) = tp.tune(layer, file=file, clock=measure)
    assert found.row["path"] == "closed"  # a microsecond, by this clock
    best = min((t for t in found.trials if t.path == "kernel"), key=lambda t: t.microseconds)
    assert best.config == {"fwd": {"block_matrices": 1}, "bwd": {"num_warps": 8}}
    assert best.microseconds == pytest.approx(10 + 10 / 8)
    assert slow.block_matrices != 1
    assert [t.path for t in found.trials[-3:]] == ["closed", "composed", "kernel"]


def test_tall_kernels_are_launched_with_what_is_tried(file, monkeypatch):
    tall = pytest.importorskip("tritonparam.kernels.tall")
    combine = paths.kernels("curve").combine
    launched = []

    def record(*args, config, **numbers):
        launched.append(config)
        return combine(*args, config=config, **numbers)

    monkeypatch.setattr(paths.kernels("curve"), "combine", record)

    def measure(step):
        launched.clear()
        step()
        if not launched:
            return 1e-6
        return 1e-5 * (3 - (launched[0].num_warps == 4)) - 1e-6 * (launched[-1].block_rows == 32)

    candidates = tall.candidates

    def some(*choice):
        """The default, and those that differ from it in a number of warps, or rows."""
        default, *others = candidates(*choice)
        numbers = ({"num_warps": 4}, {"block_rows": 32})
        return [default, *(c for c in others if c in [replace(default, **x) for x in numbers])]

    monkeypatch.setattr(paths.kernels("tall_cayley"), "candidates", some)
    monkeypatch.setattr(trials, "compiled", lambda found, problem: found)
    layer = tp.orthogonal(torch.nn.Linear(2, 5), "weight", "cayley", use_trivialization=False)
    layer = layer.to("cuda" if torch.cuda.is_available() else "cpu")
    with tp.use_path("kernel"):
        (found,) = tp.tune(layer, file=file, clock=measure)
    best = min((t for t in found.trials if t.path == "kernel"), key=lambda t: t.microseconds)
    assert best.config == {"fwd": {"num_warps": 4}, "bwd": {"block_rows": 32}}
    assert best.microseconds == pytest.approx(19)
    assert not any(trial.reason for trial in found.trials)


def test_what_is_compiled_is_discarded_for_a_reason():
    pytest.importorskip("triton")
    problem = trials.Problem("cayley", 8, torch.float32, "sm_90")
    wrong = Trial("kernel", {"bwd": {"precision": "bf16x9"}})
    narrow = Trial("kernel", {"fwd": {"maxnreg": 24}})
    default, spilling, failing = trials.compiled([Trial("kernel", {}), narrow, wrong], problem)
    assert default.reason == ""
    assert 16 < default.resources["regs"] <= 255
    assert spilling.reason.startswith("it spills ")
    assert failing.reason.startswith("cayley_bwd_8_fp32 does not compile: ")
    assert failing.resources is None
    much = {"regs": 1, "stack": 0, "shared": 300 << 10}
    assert (
        trials._too_much(much, "sm_90")
        == "it needs 307200 bytes of shared memory, sm_90 has 232448"
    )


def test_what_cannot_be_launched_is_discarded(monkeypatch):
    pytest.importorskip("triton")
    error = RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
    weight = trials.Weight(cayley().parametrizations.weight, {}, "closed")

    def fail():
        raise error

    monkeypatch.setattr(weight, "wrong", fail)
    monkeypatch.setattr(weight, "_on", lambda trial: nullcontext())
    reason = f"it cannot be launched: RuntimeError: {error}"
    (found,) = weight.timed([Trial("kernel", {})], None)
    assert (found.reason, found.microseconds) == (reason, None)
    with pytest.raises(RuntimeError):
        weight.timed([Trial("closed", {})], None)
    error = ValueError("a mistake")
    with pytest.raises(ValueError, match="a mistake"):
        weight.timed([Trial("kernel", {})], None)


def test_the_clock_of_the_host_measures():
    measure = trials.clock_of(torch.device("cpu"))
    assert (
        0 < measure(lambda: None) < measure(lambda: torch.randn(300, 300) @ torch.randn(300, 300))
    )
