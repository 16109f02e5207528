"""`python -m tests.resumed`, on tests that end their process."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import resumed

TESTS = """
import ctypes, pytest

def endless(): ctypes.PyDLL(None).sleep(100)  # nobody can interrupt it
def test_first(): assert 1 == 2
def test_endless(): endless()
@pytest.fixture
def afterwards(): yield; endless()
def test_endless_afterwards(afterwards): assert 2 == 3
def test_last(): assert 3 == 4
"""


def test_the_tests_after_one_that_ends_its_process_run(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("import no_such_module")
    environment = {resumed.LONGEST: "3", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.resumed", "-q", str(tmp_path)],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    missing = "ModuleNotFoundError: No module named 'no_such_module'"
    for said in ("assert 1 == 2", "assert 2 == 3", "assert 3 == 4", missing):
        assert done.stdout.count(f"E   {said}\n") == 1
    for name in ("test_endless", "test_endless_afterwards"):
        assert f"{name} ended its process" in done.stdout
    assert "in test_endless" in done.stderr
    assert "in afterwards" in done.stderr


@pytest.mark.parametrize(
    ("until", "wrote", "processes"),
    [("inf", ["a\n", "done\n"], 2), ("1", ["a\n"], 1), ("inf", [""], 1)],
    ids=["follows", "time is over", "nothing begins"],
)
def test_whether_another_process_follows(until, wrote, processes, monkeypatch):
    started = []

    def run(command, env):
        with open(env[resumed.JOURNAL], "a") as journal:
            journal.write(wrote[len(started)])
        started.append(command)
        return SimpleNamespace(returncode=-11 if len(started) == 1 else resumed.NO_TESTS)

    monkeypatch.setenv(resumed.UNTIL, until)
    monkeypatch.setattr(resumed.subprocess, "run", run)
    monkeypatch.setattr(resumed.signal, "signal", lambda *_: None)
    assert resumed.main([]) == -11
    assert len(started) == processes


@pytest.mark.parametrize(("errors", "lost"), [(1, False), (2, True)])
def test_a_lost_device_fails_again(errors, lost, tmp_path, monkeypatch):
    left = [RuntimeError("an illegal memory access was encountered")] * errors

    def synchronize():
        if left:
            raise left.pop()

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    journal = tmp_path / "journal"
    journal.touch()
    plugin, session = resumed.Plugin(journal), SimpleNamespace(items=[], shouldstop=False)
    session.config = SimpleNamespace(option=SimpleNamespace())
    plugin.pytest_collection_finish(session)
    plugin.pytest_runtest_logreport(SimpleNamespace(failed=True, nodeid="a", longreprtext=""))
    plugin.pytest_sessionfinish(session)
    assert bool(session.shouldstop) == lost
    assert journal.read_text() == ("" if lost else "done\n")
