"""`python -m tritonparam doctor`: what it finds on a sound machine, and with real faults."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import tritonparam as tp
from tritonparam import configs, doctor, info, paths, samples, surroundings, tables
from tritonparam.surroundings import FAILED, OK, SKIPPED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def few(monkeypatch):
    """Three chains, and an installation that is none of this test's business."""
    monkeypatch.setattr(samples, "NAMES", ("cayley", "spectral_norm", "weight_norm"))
    monkeypatch.setattr(surroundings, "install", lambda: (OK, "imported"))


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(doctor, "_kernel_declines", lambda module: "not here")


def invoke(*arguments):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from tritonparam import cli

    return CliRunner().invoke(cli.application(), ["doctor", *arguments])


def broken_closed_form(monkeypatch, change):
    closed = tp.ops.cayley._closed_fwd

    def wrong(w, d):
        q, saved = closed(w, d)
        return change(q), saved

    monkeypatch.setattr(tp.ops.cayley, "_closed_fwd", wrong)
    monkeypatch.setattr(tp.ops.cayley._skew_cayley, "forward", tp.ops.cayley._forward)


def test_nothing_is_wrong_here(few, no_kernels):
    result = invoke()
    assert result.exit_code == 0, result.output
    assert result.output.endswith("Nothing is wrong.\n")
    assert max(map(len, result.output.splitlines())) <= 80
    for name in ("versions", "device", "triton", "cayley", "weight_norm", "training step"):
        assert re.search(rf"^ok +{name} ", result.output, re.M), result.output
    assert re.search(r"^skipped table +TRITONPARAM_CACHE_DIR is empty", result.output, re.M)
    graphs = "ok" if torch.cuda.is_available() else "skipped"
    assert re.search(rf"^{graphs} +CUDA graphs ", result.output, re.M)


def test_what_it_does_leaves_no_trace():
    random, path = torch.get_rng_state(), tp.paths.override()
    assert doctor.training_step()[0] == OK
    assert torch.equal(torch.get_rng_state(), random)
    assert tp.paths.override() == path


@pytest.mark.parametrize("name", samples.NAMES)
def test_every_chain_is_checked(name, no_kernels):
    status, text = doctor.chain(name)
    assert status == OK
    assert float(text.removeprefix("largest relative error closed ")) < 2e-6


def test_every_rule_of_a_link_of_ours_has_a_sample():
    assert {rule.name for rule in tp.rules.RULES} - {*samples.NAMES} == {
        "orthogonal",  # which tall_cayley, tall_exp and householder are of
        "torch_orthogonal",
    }


def test_a_broken_closed_form(few, no_kernels, monkeypatch):
    broken_closed_form(monkeypatch, lambda q: q + 0.01)
    result = invoke("--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    found = {check["name"]: check for check in report["checks"]}
    assert found["cayley"]["status"] == "failed"
    assert "closed: the value of cayley is off by" in found["cayley"]["text"]
    assert "use_path('composed')" in found["cayley"]["text"]
    assert found["weight_norm"]["status"] == "ok"
    assert found["training step"]["status"] == ("ok" if torch.cuda.is_available() else "failed")
    assert report["failed"] == sum(check["status"] == "failed" for check in report["checks"]) >= 1


@pytest.mark.parametrize("change", [lambda q: q * float("nan"), lambda q: q[:1]])
def test_a_closed_form_that_is_not_finite_or_raises(change, no_kernels, monkeypatch):
    broken_closed_form(monkeypatch, change)
    assert doctor.chain("cayley")[0] == FAILED


def test_a_broken_kernel(monkeypatch):
    kernels = pytest.importorskip("tritonparam.kernels.cayley")
    launch = kernels.cayley_bwd
    monkeypatch.setattr(kernels, "cayley_bwd", lambda *args: 1.01 * launch(*args))
    status, text = doctor.triton()
    assert status == FAILED
    assert "a kernel ran wrong: the gradient of cayley is off by" in text
    assert "closed forms and torch's own chains remain" in text
    status, text = doctor.chain("cayley")
    assert status == FAILED
    assert "kernel: the gradient of cayley is off by" in text
    assert "use_path('closed')" in text


def test_a_triton_that_cannot_be_imported_is_one_failure(monkeypatch):
    pytest.importorskip("triton")

    def kernels(name=""):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(paths, "kernels", kernels)
    status, text = doctor.triton()
    assert status == FAILED
    assert "cannot be imported (ImportError: undefined symbol)" in text
    status, text = doctor.chain("cayley")
    assert status == OK
    assert "closed" in text
    assert "kernel" not in text


def test_a_check_that_raises_is_one_failure():
    def fails():
        raise OSError("the disk is gone\nand more")

    results = list(doctor.run([("disk", fails), ("other", lambda: (OK, "well"))]))
    assert [result.status for result in results] == [FAILED, OK]
    assert results[0].text.startswith("OSError: the disk is gone; report it")
    assert doctor.summary(results) == "1 of 2 checks failed: disk."


def test_the_path_in_the_environment(monkeypatch):
    with tp.use_path("composed"):
        assert doctor.training_step() == (SKIPPED, "the path is set to composed")
    for name in ("TRITONPARAM_PATH", "TRITON_INTERPRET", "TRITONPARAM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert surroundings.environment() == (OK, "no variable changes what is done")
    monkeypatch.setenv("TRITONPARAM_PATH", "composed")
    assert "fusing is off until it is unset" in surroundings.environment()[1]
    monkeypatch.setenv("TRITONPARAM_PATH", "kernel")
    monkeypatch.setattr(tp.paths, "_HAS_TRITON", False)
    status, text = surroundings.environment()
    assert status == FAILED
    assert "no kernel can run here" in text
    assert "unset it" in text


def test_the_interpreter_on_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITONPARAM_PATH", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, text = surroundings.environment()
    assert status == FAILED
    assert "on a machine with a GPU" in text


@pytest.mark.parametrize(("name", "number"), [("torch", "2.7.1+cu126"), ("triton", "3.5.0")])
def test_old_versions(name, number, monkeypatch):
    here = info.here()
    monkeypatch.setattr(info, "here", lambda: here | {name: number})
    status, text = surroundings.versions()
    assert status == FAILED
    oldest = ".".join(map(str, surroundings.OLDEST[name]))
    assert text.startswith(f"{name} {number} is older than {oldest}")
    assert f"pip install '{name}>={oldest}'" in text


def test_the_oldest_versions_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    for name, oldest in surroundings.OLDEST.items():
        assert re.search(rf'{name}"?( = ")?>={".".join(map(str, oldest))}\b', project), name


def test_a_shadowing_copy(tmp_path, monkeypatch):
    (tmp_path / "tritonparam").mkdir()
    (tmp_path / "tritonparam" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    status, text = surroundings.install()
    assert status == FAILED
    assert str(tmp_path / "tritonparam") in text
    assert f"imported from {surroundings.HERE}" in text
    monkeypatch.setattr(surroundings, "_copies", lambda: [surroundings.HERE])
    assert surroundings.install() == (OK, f"imported from {surroundings.HERE}")
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
    assert "is a source folder; pip install -e" in surroundings.install()[1]


def table(folder, monkeypatch):
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", str(folder))
    return tables.users_file()


def test_a_table_that_is_corrupt(tmp_path, monkeypatch):
    file = table(tmp_path, monkeypatch)
    file.write_text('{"format": 1, "rows": [')
    status, text = surroundings.cache()
    assert status == FAILED
    assert f"{file} is not used: Expecting value" in text
    assert "Delete the file, and run `tune` again" in text


def test_a_table_of_another_torch(tmp_path, monkeypatch):
    file = table(tmp_path, monkeypatch)
    file.write_text('{"format": 1, "made_with": {"torch": "1.0"}, "rows": []}')
    status, text = surroundings.cache()
    assert status == FAILED
    assert "it was made with {'torch': '1.0'}" in text


def test_a_table_of_this_and_of_another_device(tmp_path, monkeypatch):
    file = table(tmp_path, monkeypatch)
    cpu = configs.device_name(torch.device("cpu"))
    row = {"dtype": "float32", "chain": "cayley", "n": 8, "batch": 1, "path": "closed"}
    rows = [row | {"device": device, "config": {}} for device in (cpu, "NVIDIA Abacus")]
    assert surroundings.cache()[1].startswith(f"no table yet in {tmp_path}")
    tables.store(rows, file)
    status, text = surroundings.cache()
    assert status == OK
    assert text == f"2 rows in {file}; those of NVIDIA Abacus wait for that device"
    file.rename(tmp_path / "tuned-torch1.json")
    assert "(1 of other versions are not used)" in surroundings.cache()[1]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folders = [tmp_path / "file" / "sub"]
    if os.geteuid():  # root writes anywhere
        folders.append(tmp_path / "closed")
        folders[-1].mkdir(0o500)
    for folder in folders:
        table(folder, monkeypatch)
        status, text = surroundings.cache()
        assert status == FAILED
        assert f"{folder} cannot be written (" in text
        assert "set TRITONPARAM_CACHE_DIR to a folder of yours" in text


def test_without_triton_and_with_a_broken_one(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor.triton() == (
        SKIPPED,
        "triton is not installed: closed forms and torch's own chains remain",
    )
    monkeypatch.undo()
    pytest.importorskip("triton")

    def broken(name=""):
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(tp.paths, "kernels", broken)
    status, text = doctor.triton()
    assert status == FAILED
    assert "cannot be imported (ImportError: libtriton.so: undefined symbol)" in text
    assert os.path.dirname(sys.modules["triton"].__file__) in text


def test_a_compiler_that_fails(monkeypatch):
    aot = pytest.importorskip("tritonparam.kernels.aot")
    monkeypatch.setattr(tp.paths.kernels(), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def fails(*_):
        raise RuntimeError("ptxas: not found")

    monkeypatch.setattr(aot, "compile_kernel", fails)
    status, text = doctor.triton()
    assert status == FAILED
    assert re.match(r"it does not compile cayley_fwd\w+ for sm_90: RuntimeError: ptxas", text)


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/nvidia0" or exists(self))
    status, text = surroundings.device()
    assert status == FAILED
    assert "a GPU (/dev/nvidia0) that torch" in text
    assert "the driver may be too old" in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides the GPU" in surroundings.device()[1]
