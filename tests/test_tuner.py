"""The tuner, with a made-up clock: what it tries, discards, chooses, stores, and goes on with."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import tritonparam as tp
from tritonparam import configs, failures, paths, tables, trials, tuner


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


def test_what_failed_before_is_tried_again(file, monkeypatch):
    """So that a row with no room on the device is replaced in the process that met it, too."""
    monkeypatch.setattr(failures, "_causes", {})
    monkeypatch.setattr(failures, "_warned", set())
    layer = cayley()
    with pytest.warns(UserWarning, match="tune --again"):
        failures.remember("cayley", layer.weight, 4, RuntimeError("in cooperative launch"))
    tp.tune(layer, file=file, clock=clock(closed=2e-5, composed=1e-5))
    assert not failures.cause("cayley", layer.weight, 4)


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
