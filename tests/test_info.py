"""`python -m tritonparam info`; that it compiles every kernel is proved by test_aot.py."""

import json
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from tritonparam import cli, info, tables, use_path

ROWS = [
    {"name": "cayley_fwd_8_fp32", "target": "sm_90", "regs": 52, "stack": 0, "shared": 1024},
    {"name": "cayley_fwd_8_fp32", "target": "gfx942", "regs": 50, "stack": 16, "shared": 65536},
]
WITHOUT_TRITON = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
sys.modules["triton"] = None
from tritonparam.cli import main
main()
"""


def invoke(*arguments):
    return CliRunner().invoke(cli.application(), ["info", *arguments])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_state_of_the_users_table(folder, monkeypatch):
    def table():
        return json.loads(invoke("--json").stdout)["table"]

    file = tables.users_file()
    assert table() == f"none of these versions in {folder}"
    row = {"device": "cpu", "dtype": "float32", "chain": "cayley", "n": 8, "batch": 1}
    tables.store([row | {"path": "closed", "config": {}}], file)
    assert table() == f"1 row in {file}"
    file.write_text("{")
    assert table().startswith(f"{file} is not used: ")
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", "")
    assert table() == "switched off: TRITONPARAM_CACHE_DIR is empty"


def test_versions_and_device(monkeypatch):
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", "")
    result = invoke()
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    lines = dict(re.findall(r"^(\S+)  +(.*)", result.stdout, re.M))
    names = ["tritonparam", "torch", "triton", "python", "device", "kernels", "path", "table"]
    assert list(lines) == names
    assert lines["torch"] == torch.__version__
    assert lines["path"] == "chosen by the rules"
    with use_path("composed"):
        facts = json.loads(invoke("--json").stdout)
    assert list(facts) == names
    assert facts["path"] == "set to composed"


def test_why_kernels_cannot_run(monkeypatch):
    kernels = pytest.importorskip("tritonparam.kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert info.here()["kernels"] == "no: torch sees no GPU"
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "tritonparam.kernels", None)
        broken.delattr("tritonparam.kernels")
        assert re.match("no: ModuleNotFoundError: .*kernels", info.here()["kernels"])
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert "TRITON_INTERPRET is set" in info.here()["kernels"]


def test_the_table_shows_every_number(monkeypatch):
    asked = []
    monkeypatch.setattr(info, "compiled", lambda targets: asked.append(targets) or ROWS)
    result = invoke("--kernels", "--target", "sm_90", "--target", "gfx942")
    assert result.exit_code == 0, result.output
    assert asked == [["sm_90", "gfx942"]]
    assert re.search(r"^ cayley_fwd_8_fp32 +sm_90 +52 +0 +1024$", result.stdout, re.M)
    assert re.search(r"^ cayley_fwd_8_fp32 +gfx942 +50 +16 +65536$", result.stdout, re.M)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert json.loads(invoke("--kernels", "--json").stdout) == {"kernels": ROWS}


def test_a_target_that_the_compiler_does_not_know_is_refused_before_the_rest(monkeypatch):
    """LLVM ends the process that asks for sm_20."""
    aot = pytest.importorskip("tritonparam.kernels.aot")
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, -6)

    monkeypatch.setattr(aot.subprocess, "run", run)
    result = invoke("--kernels", "--target", "sm_90", "--target", "sm_20")
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert "--target must be a GPU that Triton" in output
    assert "as sm_80, sm_90, sm_100, gfx942, got 'sm_20'" in output
    (command,) = asked
    assert command[-1].endswith("compile_kernel(*shipped('sm_20')[0], 'sm_20')")


@pytest.mark.parametrize("bad", ["hopper", "sm_", "sm_9x", "gfx", "90", "sm_90 ", ""])
def test_a_bad_target_is_named(bad):
    pytest.importorskip("triton")
    result = invoke("--kernels", "--target", "sm_90", "--target", bad)
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert f"--target must be like sm_90 or gfx942, got '{bad}'." in output


def test_a_target_without_kernels():
    result = invoke("--target", "sm_90")
    assert result.exit_code == 2
    assert "--target needs --kernels" in result.output


class Pool:
    """In the place of the processes: calls that return these results, or raise."""

    def __init__(self, results):
        self.results = results

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, _, targets, indices):
        assert set(targets) == {"sm_90"}
        assert list(indices) == list(range(len(targets)))
        for result in self.results:
            if isinstance(result, BaseException):
                raise result
            yield result


def test_a_kernel_that_does_not_compile_is_one_sentence(monkeypatch):
    pytest.importorskip("triton")
    for results, sentence in (
        ([ROWS[0], "cayley does not compile for sm_90: Error: no"], "cayley does not compile"),
        ([ROWS[0], BrokenProcessPool()], "the compiler gave up on sm_90"),
    ):
        monkeypatch.setattr(info, "ProcessPoolExecutor", Pool(results))
        result = invoke("--kernels", "--json", "--target", "sm_90", "--target", "sm_90")
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 1
        assert sentence in result.output
        assert "{" not in result.stdout


def test_the_sentence_names_the_kernel():
    aot = pytest.importorskip("tritonparam.kernels.aot")
    compile_kernel = aot.compile_kernel

    def refuse(*_):
        raise ValueError("\n no registers left \n ...")

    aot.compile_kernel = refuse
    try:
        row = info._compile("sm_90", 0)
    finally:
        aot.compile_kernel = compile_kernel
    assert re.fullmatch(r"\w+ does not compile for sm_90: ValueError: no registers left", row)


@pytest.mark.parametrize("arguments", [["--kernels"], ["--kernels", "--json"], []])
def test_without_triton(arguments, tmp_path):
    command = [sys.executable, "-c", WITHOUT_TRITON, "info", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if not arguments:
        assert done.returncode == 0
        assert "no: triton is not installed" in done.stdout
        return
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "tritonparam: triton is not installed, so that there are no kernels to compile.\n"
    )
