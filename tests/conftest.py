import os

import torch

# Before anything imports triton: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["TRITONPARAM_CACHE_DIR"] = ""  # what somebody tuned on this machine is not tested
if {"PYTEST_XDIST_WORKER", "TRITONPARAM_TEST_PART"} & os.environ.keys():
    torch.set_num_threads(1)  # there is a worker for every core

import pytest

try:
    import tritonparam
except ImportError as error:
    raise pytest.UsageError(
        f"{error}: install the project first, for example with pip install -e '.[test]'"
    ) from None

from tests.interpreter import patch_once_a_launch, round_to_nearest
from tests.on_gpu import of_this_process

if os.environ.get("TRITON_INTERPRET"):
    patch_once_a_launch()
    round_to_nearest()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items):
    """Marked `gpu`, for ``make gpu``: what runs on a GPU where there is one, test by test where it
    takes `device`, else by file."""
    for item in items:
        module = getattr(item, "module", None)  # none of a docstring's example
        if "device" in getattr(item, "fixturenames", ()) or hasattr(module, "DEVICE"):
            item.add_marker("gpu")


def pytest_collection_finish(session):
    session.items[:] = of_this_process(session.items)  # of what -m has left


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    """A seed, no statistics, and aliases, rules and a path that do not outlive the test."""
    torch.manual_seed(0)
    monkeypatch.setattr(tritonparam.registry, "_aliases", {})
    monkeypatch.setattr(tritonparam.declared, "_added", ())
    monkeypatch.setattr(tritonparam.paths, "_override", None)
    tritonparam.stats(reset=True)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def fused_path() -> str:
    """The path of a small fused chain on this machine."""
    return "kernel" if DEVICE == "cuda" else "closed"


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What a launcher allocates holds NaN, or -1, until a kernel has written it."""

    def poisoned(allocate):
        def made(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else -1)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
