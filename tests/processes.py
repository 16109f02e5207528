"""Processes that end with the one that started them, or when their time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

GRACE = 5.0  # seconds between the request to stop, at which pytest prints what failed, and the end


class Processes:
    """A context in which processes run, each in a group of its own with what it starts.

    A group is killed when ``wait`` has its process's status; those that are left, when the context
    is, by an error, Ctrl-C or a termination.
    """

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Processes:
        # A shell has its background jobs ignore SIGINT, as what they start then does.
        handlers = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: lambda *_: sys.exit(128 + signal.SIGTERM),
        }
        self._before = {which: signal.signal(which, to) for which, to in handlers.items()}
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            _kill(process)
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Start one, with the options of ``subprocess.Popen``."""
        self._started.append(subprocess.Popen(command, start_new_session=True, **options))
        return self._started[-1]

    def wait(self, deadline: float) -> Iterator[int | None]:
        """Their statuses in the order of their starts; None for one that the deadline has stopped.

        That is a reading of ``time.monotonic``.
        """
        stopped: list[subprocess.Popen] = []
        while self._started:
            process = self._started[0]
            status = _status(process, deadline)
            if status is None and not stopped:
                stopped = [p for p in self._started if p.poll() is None]
                for late in stopped:
                    _signal(late, signal.SIGINT)
            if process in stopped:
                _status(process, deadline + GRACE)
                status = None
            _kill(process)
            del self._started[0]
            yield status


def _status(process: subprocess.Popen, deadline: float) -> int | None:
    try:
        return process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return None


def _signal(process: subprocess.Popen, which: int) -> None:
    """To its group, which can outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, which)


def _kill(process: subprocess.Popen) -> None:
    _signal(process, signal.SIGKILL)
    process.wait()
