"""pytest that outlives a test which takes its process along: ``python -m tests.resumed ARGUMENTS``.

After an illegal access every call to the device fails, and nobody can interrupt a host that waits
for a kernel without an end. Either ends the process, and another one runs the tests that are left.
So failures are printed as they come, and a file that cannot be imported stops no other.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

JOURNAL = "TRITONPARAM_TEST_JOURNAL"  # a file: the tests that have begun, then DONE
BEGAN = "TRITONPARAM_TEST_BEGAN"  # when the first process did, in seconds since the epoch
UNTIL = "TRITONPARAM_TEST_UNTIL"  # the same time: what is not done LATE seconds after it is ended
LONGEST = "TRITONPARAM_TEST_LONGEST"  # seconds of one test
DONE = "done"
LATE = 45.0
NO_TESTS = 5  # pytest's exit status


def main(arguments: list[str]) -> int:
    """Run pytest until all tests have begun or the time is over; its first status that is not 0."""
    signal.signal(signal.SIGINT, lambda *_: None)  # pytest has it too, prints what failed and ends
    command = [sys.executable, "-m", "pytest", "-p", "tests.resumed", "--tb=short", "--capture=sys"]
    command += ["--continue-on-collection-errors", *arguments]
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        journal.touch()
        environment = os.environ | {JOURNAL: str(journal), BEGAN: str(time.time())}
        while True:
            before = journal.read_text()
            status = subprocess.run(command, env=environment).returncode
            if status != NO_TESTS or not before:
                first = first or status
            begun = journal.read_text()
            if begun.endswith(f"{DONE}\n") or begun == before or time.time() > _until():
                return first
            last = begun.splitlines()[-1]
            print(f"tests.resumed: {last} ended its process; the next goes on", flush=True)


def _until() -> float:
    return float(os.environ.get(UNTIL) or "inf")


class Plugin:
    """Writes the journal, leaves out what is in it, and ends a process that is of no more use."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._begun = set(journal.read_text().splitlines())
        self._lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._session = session
        session.items[:] = [item for item in session.items if item.nodeid not in self._begun]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self._begun:  # a later process finds the same
            print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.__stdout__, flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid)
        self._watch()

    @pytest.hookimpl(trylast=True)
    def pytest_exception_interact(self, node: pytest.Item | pytest.Collector) -> None:
        if isinstance(node, pytest.Item):  # pytest has just cancelled it; the teardown is left
            self._watch()

    def _watch(self) -> None:
        longest = float(os.environ.get(LONGEST) or "120")
        seconds = max(min(longest, _until() + LATE - time.time()), 1.0)
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def pytest_runtest_logfinish(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.__stdout__, flush=True)
        if report.failed and _device_is_lost():
            self._lost = True
            self._session.shouldstop = f"the device is lost after {report.nodeid}"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        session.config.option.tbstyle = "no"  # failures have been printed
        if not self._lost:
            self._write(DONE)

    def _write(self, line: str) -> None:
        with self._journal.open("a") as file:
            file.write(f"{line}\n")


def _device_is_lost() -> bool:
    """Whether a call to it fails again: an error that it gets over is reported once."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    for _ in range(2):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        return False
    return True


def pytest_configure(config: pytest.Config) -> None:
    """The plugin, where `main` has started this process."""
    if JOURNAL in os.environ:
        config.pluginmanager.register(Plugin(Path(os.environ[JOURNAL])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
