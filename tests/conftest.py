import os
import subprocess
import sys
import tempfile

import torch

# Before anything imports triton: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

try:
    import tritonparam
except ImportError as error:
    raise pytest.UsageError(
        f"{error}: install the project first, for example with pip install -e '.[test]'"
    ) from None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    """A seed, no statistics, and aliases, rules and a path that do not outlive the test."""
    torch.manual_seed(0)
    monkeypatch.setattr(tritonparam.registry, "_aliases", {})
    monkeypatch.setattr(tritonparam.declared, "_added", ())
    monkeypatch.setattr(tritonparam.registry, "_override", None)
    tritonparam.stats(reset=True)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def fused_path() -> str:
    """The path of a small fused chain on this machine."""
    return "kernel" if DEVICE == "cuda" else "closed"


# Compiling every kernel for every target takes minutes: it runs beside all other tests, on what
# they leave idle, and the tests that read its report come last.
AOT = "test_aot.py"
AOT_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_compiling = pytest.StashKey()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == AOT)


def pytest_collection_finish(session):
    here = any(item.path.name == AOT for item in session.items)
    if not here or session.config.option.collectonly:
        return
    folder = tempfile.TemporaryDirectory()
    command = [sys.executable, "-m", "tritonparam", "info", "--kernels", "--json"]
    command += [part for target in AOT_TARGETS for part in ("--target", target)]
    # It compiles in processes of its own, even so.
    environment = {"TRITON_CACHE_DIR": folder.name, "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: os.nice(10)) if hasattr(os, "nice") else None,
    )
    session.config.stash[_compiling] = process, folder
    torch.set_num_threads(1)  # threads that wait for one another would wait for the compiler


def pytest_sessionfinish(session):
    if _compiling in session.config.stash:
        process, folder = session.config.stash[_compiling]
        process.kill()
        process.wait()
        folder.cleanup()


@pytest.fixture(scope="session")
def compiled(request) -> tuple[int, str, str]:
    """The exit code and the output of ``tritonparam info --kernels --json`` for AOT_TARGETS."""
    process, _ = request.config.stash[_compiling]
    out, err = process.communicate()
    return process.returncode, out, err
