"""The tuner, with a made-up clock: what it tries, discards, chooses, stores, and goes on with."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace

import pytest
import torch

import tritonparam as tp
from tritonparam import configs, paths, samples, tables, trials, tuner
from tritonparam.trials import Trial


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """A made-up clock says the same each time."""
    for name in ("STEPS", "LEAST", "MOST"):
        monkeypatch.setattr(trials, name, 1)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tuned.json"


def clock(**seconds):
    """One that says what it is told of a path; anything else than a step takes a microsecond."""

    def measure(step):
        step()
        return seconds.get(paths.override(), 1e-6)

    return measure


def cayley(n=4):
    return tp.register_parametrization(torch.nn.Linear(n, n), "weight", tp.Skew(), tp.CayleyMap())


def test_the_fastest_is_stored_and_taken(file, monkeypatch):
    layer = cayley()
    (found,) = tp.tune(layer, file=file, clock=clock(closed=2e-5, composed=1e-5))
    assert [(t.path, t.microseconds) for t in found.trials] == [
        ("closed", pytest.approx(20)),
        ("composed", pytest.approx(10)),
    ]
    assert found.floor == pytest.approx(0.1)
    assert "→  composed" in str(found)
    assert "10% of the fastest" in str(found)
    assert list(tables.read(file).values()) == [found.row]
    assert found.row == {
        "device": configs.device_name(layer.weight.device),
        "dtype": "float32",
        "chain": "cayley",
        "n": 4,
        "batch": 1,
        "path": "composed",
        "config": {},
    }
    monkeypatch.setattr(tables, "users_file", lambda: file)
    configs.reload()
    assert "measured faster" in tp.explain(layer)[0].reason
    configs.reload()


def test_what_gains_too_little_does_not_replace_the_default(file):
    (found,) = tp.tune(cayley(), file=file, clock=clock(closed=1.00e-5, composed=0.96e-5))
    assert found.row["path"] == "closed"


def test_what_gains_in_few_rounds_does_not_replace_the_default(file, monkeypatch):
    monkeypatch.setattr(trials, "LEAST", 5)
    monkeypatch.setattr(trials, "MOST", 5)
    composed = iter([1, 0.9, 0.9, 1.1, 0.9, 1.1])

    def measure(step):
        step()
        return next(composed) if paths.override() == "composed" else 1

    (found,) = tp.tune(cayley(), file=file, clock=measure)
    assert (found.trials[1].ratio, found.trials[1].upper) == (0.9, 1.1)
    assert found.row["path"] == "closed"


def test_a_turn_is_its_fastest_step(file, monkeypatch):
    """Of every three steps two are held up."""
    monkeypatch.setattr(trials, "STEPS", 3)
    held_up = itertools.cycle([900, 1, 30])

    def measure(step):
        step()
        return next(held_up) * (0.9e-5 if paths.override() == "composed" else 1e-5)

    (found,) = tp.tune(cayley(), file=file, clock=measure)
    assert [t.microseconds for t in found.trials] == [pytest.approx(10), pytest.approx(9)]
    assert found.row["path"] == "composed"
    steps = iter([0.4, 0.3, 0.2])
    assert trials.fastest(lambda step: next(steps), None) == 0.3  # there is no time for a third


def test_what_slows_the_machine_down_does_not_choose(file, monkeypatch):
    """From the middle of the fifth round on, steps take three times as long."""
    monkeypatch.setattr(trials, "LEAST", 8)
    monkeypatch.setattr(trials, "MOST", 8)
    turns = []

    def slower(step):
        step()
        if paths.override() not in ("closed", "composed"):
            return 1e-6  # a copy, for the floor
        turns.append(paths.override())
        seconds = 0.9e-5 if turns[-1] == "composed" else 1e-5
        return seconds if len(turns) <= 2 + 4 * 2 + 1 else 3 * seconds

    (found,) = tp.tune(cayley(), file=file, clock=slower)
    there, back = ["closed", "composed"], ["composed", "closed"]
    assert turns == there + 4 * (there + back)
    closed, composed = found.trials
    assert closed.microseconds < composed.microseconds  # the medians, each by itself
    assert (closed.ratio, composed.ratio) == (1, pytest.approx(0.9))
    assert found.row["path"] == "composed"


def test_a_weight_that_no_path_reads_right_is_left_alone(file):
    broken, right = cayley(3), cayley(8)
    broken.parametrizations.weight.original.data.fill_(torch.nan)
    found = tp.tune(torch.nn.Sequential(broken, right), file=file, clock=clock())
    assert [trial.reason for trial in found[0].trials] == ["its value is off by nan"] * 2
    assert "→" not in str(found[0])
    assert [row["n"] for row in tables.read(file).values()] == [8]


def test_the_model_is_not_changed(file):
    model = torch.nn.Sequential(
        tp.spectral_norm(torch.nn.Conv2d(3, 4, 3)),
        tp.weight_norm(torch.nn.Linear(5, 6)),
        tp.orthogonal(torch.nn.Linear(5, 3)),
        cayley(),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = tp.tune(model, file=file, clock=clock())
    assert [t.row["chain"] for t in found] == [
        "spectral_norm",
        "weight_norm",
        "householder",
        "cayley",
    ]
    assert all(not trial.reason for t in found for trial in t.trials)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert paths.override() is None


def test_an_interrupted_run_goes_on_where_it_was(file):
    model = torch.nn.Sequential(cayley(4), cayley(4), cayley(9), cayley(33))
    measured = []

    def track(kinds):
        for kind in kinds:
            measured.append(kind[1].original.size(-1))
            if len(measured) == 2:
                raise KeyboardInterrupt
            yield kind

    with pytest.raises(KeyboardInterrupt):
        tp.tune(model, file=file, clock=clock(), track=track)
    assert [row["n"] for row in tables.read(file).values()] == [4]
    found = tp.tune(model, file=file, clock=clock())
    assert [t.row["n"] for t in found] == [9, 33]
    assert tp.tune(model, file=file, clock=clock()) == []
    assert len(tp.tune(model, file=file, clock=clock(), again=True)) == 3


def test_a_wrong_result_is_discarded(file, monkeypatch):
    closed = tp.ops.cayley._closed_fwd

    def wrong(w, d):
        q, saved = closed(w, d)
        return q + 0.01, saved

    monkeypatch.setattr(tp.ops.cayley, "_closed_fwd", wrong)
    monkeypatch.setattr(tp.ops.cayley._skew_cayley, "forward", tp.ops.cayley._forward)
    (found,) = tp.tune(cayley(), file=file, clock=clock(closed=1e-9, composed=1e-5))
    assert found.row["path"] == "composed"
    assert found.trials[0].reason == "its value is off by 1e-02"
    assert found.trials[0].microseconds is None


def test_refusals(file, monkeypatch):
    with pytest.raises(TypeError, match="tune: the model must be an nn.Module, got str"):
        tp.tune("model", file=file)
    with pytest.raises(ValueError, match="no weight whose whole chain a rule takes"):
        tp.tune(torch.nn.Linear(2, 2), file=file)
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", "")
    with pytest.raises(ValueError, match="TRITONPARAM_CACHE_DIR is empty"):
        tp.tune(cayley())
    with pytest.raises(ValueError, match=r"must be one of cayley, .*, got 'householder'"):
        tuner.weight("householder", (4, 4), torch.float32, "cpu")
    with pytest.raises(ValueError, match="matrix_exp has no launch configurations .* at n = 8"):
        tuner.static("matrix_exp", 8, torch.float32, "sm_90")
    with pytest.raises(ValueError, match="cayley has no launch configurations .* at n = 5000"):
        tuner.static("cayley", 5000, torch.float32, "sm_90")


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


def test_the_clock_of_the_host_measures():
    measure = trials.clock_of(torch.device("cpu"))
    assert (
        0 < measure(lambda: None) < measure(lambda: torch.randn(300, 300) @ torch.randn(300, 300))
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with a table in a folder of its own; what a clock says is made up."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tritonparam.cli import application

    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(trials, "clock_of", lambda _: clock(closed=2e-5, composed=1e-5))
    configs.reload()
    yield lambda *arguments: CliRunner().invoke(application(), ["tune", *arguments])
    monkeypatch.undo()
    configs.reload()


def model():
    return torch.nn.Sequential(cayley(3), tp.weight_norm(torch.nn.Linear(3, 2)))


def test_command(run, tmp_path, monkeypatch):
    result = run("--chain", "cayley", "--n", "8", "--n", "16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "cayley, 1 of n = 16, float32, " in result.output
    assert result.output.count("→  composed") == 2
    assert "measured before" in run("--chain", "cayley", "--n", "8", "--device", "cpu").output
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    shipped.write_text('{"format": 1, "rows": []}')
    result = run(f"{__name__}:model", "--device", "cpu", "--ship", "--json")
    assert result.exit_code == 0, result.output
    assert f"are in {shipped}" in result.stderr
    (found,) = [json.loads(result.stdout)["tunings"]]
    assert [t["row"]["chain"] for t in found] == ["cayley", "weight_norm"]
    assert {row["n"] for row in tables.read(shipped).values()} == {3, 6, 8, 16}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "takes either a model"),
        (("--chain", "cayley"), "--chain needs --n"),
        (("--chain", "cayley", "--n", "0"), "must be at least 1"),
        (("--chain", "qr", "--n", "3"), "the chain must be one of cayley"),
        (("--chain", "cayley", "--n", "3", "--dtype", "int8"), "--dtype must be float32"),
        (("--chain", "cayley", "--n", "3", "--dtype", "float8_e5m2"), "--dtype must be float32"),
        (("--chain", "cayley", "--n", "3", "--device", "cuda:99"), "does not see 'cuda:99'"),
        (("--chain", "cayley", "--n", "3", "--target", "sm_90"), "--target goes with --static"),
        (("m:f", "--static"), "--static only compiles"),
        (("--chain", "cayley", "--n", "3", "--static", "--batch", "4"), "--static only compiles"),
        (("no_such_module:f",), "there is no module 'no_such_module'"),
    ],
)
def test_command_refuses(run, arguments, why):
    result = run(*arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.output.replace("│", " ").split())


def test_a_models_own_error_is_passed_on(run):
    result = run(f"{__name__}:failing", "--device", "cpu")
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "no data here"


def failing():
    raise ValueError("no data here")


def test_a_target_that_is_none_is_refused_before_anything_is_compiled(run):
    pytest.importorskip("triton")
    result = run("--static", "--chain", "cayley", "--n", "8", "--target", "hopper")
    assert result.exit_code == 2
    assert "target must be like sm_90 or gfx942, got 'hopper'" in " ".join(result.output.split())


def test_a_corrupt_table_is_one_warning_and_a_fresh_start(file):
    file.write_text("{")
    with pytest.warns(UserWarning, match="is not used") as said:
        tp.tune(cayley(), file=file, clock=clock(), again=True)
    assert len(said) == 1
    assert len(tables.read(file)) == 1


def test_a_table_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match=r"table .*tuned.json cannot be written \(.*CACHE_DIR"):
        tp.tune(cayley(3), file=tmp_path / "a file" / "tuned.json", clock=pytest.fail)


def test_others_can_read_a_table(file):
    before = os.umask(0o022)
    try:
        tables.store([], file)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644 or os.name == "nt"
