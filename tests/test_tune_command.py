"""``tritonparam tune``: what it stores, shows and refuses."""

from __future__ import annotations

import json

import pytest
import torch

import tritonparam as tp
from tests.test_tuner import cayley, clock
from tests.test_tuner import few_rounds as few_rounds
from tritonparam import configs, info, tables, trials


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
        (("m:f", "--n", "3"), "--n, --batch and --dtype go with --chain"),
        (("m:f", "--dtype", "float64"), "a model has its own"),
        (("--chain", "cayley", "--n", "3", "--static", "--batch", "4"), "--static only compiles"),
        (("no_such_module:f",), "there is no module 'no_such_module'"),
    ],
)
def test_command_refuses(run, arguments, why):
    result = run(*arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.output.replace("│", " ").split())


def test_without_triton_nothing_is_compiled(run, monkeypatch):
    monkeypatch.setattr(info, "find_spec", lambda _: None)
    result = run("--static", "--chain", "cayley", "--n", "8")
    assert result.exit_code == 2
    assert "triton is not installed" in " ".join(result.output.split())


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
