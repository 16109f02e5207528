"""`python -m tests.sanitize`, with a stand-in for the tool."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests import sanitize
from tests.cases import CASES
from tritonparam.kernels import expm_gemm, newton_schulz

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a script in the place of compute-sanitizer, in a toolkit's folder."""

    def install(script):
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(ROOT)
    return install


def test_both_tools_run_every_kernel(tool, capfd):
    tool('echo "$1 $2 $3 $4 $PYTORCH_NO_CUDA_MEMORY_CACHING"; shift 4; exec "$@"\n')
    assert sanitize.main([]) == 0
    printed = capfd.readouterr().out
    for name in sanitize.TOOLS:
        assert f"--tool {name} --error-exitcode 1 1\n" in printed
    lines = printed.splitlines()
    for case in [case for case in CASES if case.max_kernel_n]:
        for dtype in ("float32", "float64", "bfloat16"):
            assert lines.count(f"{case.name} {case.shape(3)} torch.{dtype}") == 2
    assert printed.count(", no error\n") == 2


@pytest.mark.parametrize(
    ("name", "expected"), [("cayley", 1), ("skew_exp", 2), ("symmetric_exp", 2)]
)
def test_rounds_in_one_launch_are_run(name, expected, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    programs = []

    def rounds(steps, n_rounds, buffers, config, **counted):
        programs.append(config.programs)

    for file in (newton_schulz, expm_gemm):
        monkeypatch.setattr(file, "rounds", rounds)
    (case,) = (case for case in CASES if case.name == name)
    monkeypatch.setattr(sanitize, "CASES", [replace(case, max_kernel_n=4096)])
    monkeypatch.setattr(sanitize, "DTYPES", (torch.float32,))
    usual = f"{name} (100, 100) torch.float32"
    assert list(sanitize.launch("cpu", ((100,),))) == [usual, f"{usual}, one launch"]
    assert programs == [0] * expected + [1] * expected


def test_an_error_is_returned(tool):
    tool('case "$2" in racecheck) exit 7;; esac\n')
    assert sanitize.main([]) == 1


def test_a_tool_that_is_too_slow_is_stopped(tool, monkeypatch, capfd):
    monkeypatch.setattr(sanitize, "SECONDS", 0.2)
    tool("sleep 100\n")
    assert sanitize.main([]) == 0
    assert "memcheck was stopped after 0.2 seconds, no error" in capfd.readouterr().out


def test_without_the_tool_it_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert sanitize.main([]) == 0
    printed = capfd.readouterr().out
    assert printed.count("\n") == 1
    assert "skipped" in printed


def test_it_is_found_on_the_path(tool, tmp_path, monkeypatch):
    tool("")
    assert sanitize.find() == str(tmp_path / "bin" / "compute-sanitizer")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert sanitize.find() == str(tmp_path / "bin" / "compute-sanitizer")
