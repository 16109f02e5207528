"""The tests that use a GPU, in parts that run at once: ``python -m tests.on_gpu SECONDS``.

Most of their time is compiling kernels, on one core each. A part is neighbouring tests, so that few
kernels are compiled twice. What has not finished after SECONDS is stopped, and prints what failed
until then; the result is 1. Each part goes on after a test that ends its process. With a folder in
the environment, what all parts print goes to ``tests.log`` there too. Arguments that follow replace
pytest's ``tests -m gpu``, which without a GPU are not started.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.processes import Processes
from tests.resumed import NO_TESTS

PARTS = min(os.cpu_count() or 1, 12)
PART = "TRITONPARAM_TEST_PART"  # "3/12" is the fourth of twelve
OUT = "TRITONPARAM_BENCH_OUT"  # the folder
NO_GPU = (
    f"a GPU is needed, and torch {torch.__version__} of {sys.executable} finds none; "
    "give make gpu another GPU_PYTHON, or run make test and make bench, which need none."
)


def of_this_process(items: list) -> list:
    """The tests of the part that the environment names, all of them where it names none."""
    part, parts = map(int, os.environ.get(PART, "0/1").split("/"))
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


def main(arguments: list[str]) -> int:
    """Run all parts, print how each ended, and return 1 where one failed or was stopped.

    Without arguments it only looks for a GPU.
    """
    seconds, *chosen = arguments or ["0"]
    if not chosen and not torch.cuda.is_available():
        print(f"tests.on_gpu: {NO_GPU}")
        return 1
    if not arguments:
        return 0
    deadline = time.monotonic() + float(seconds)
    command = [sys.executable, "-m", "tests.resumed", "-q", "-p", "no:cacheprovider"]
    command += chosen or ["tests", "-m", "gpu"]
    failed = False
    with tempfile.TemporaryDirectory() as folder, Processes() as running:
        logs = [Path(folder) / f"{part}.log" for part in range(PARTS)]
        for part, log in enumerate(logs):
            environment = os.environ | {PART: f"{part}/{PARTS}"}
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else one per core, in each part
            with log.open("w") as out:
                running.start(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        for part, (log, status) in enumerate(zip(logs, running.wait(deadline), strict=True)):
            passed = status in (0, NO_TESTS)
            failed |= not passed
            text = log.read_text(errors="replace").rstrip()
            ended = text.rpartition("\n")[2] if status is not None else f"stopped at {seconds} s"
            print(f"part {part + 1} of {PARTS}: {ended}", flush=True)
            _keep(f"part {part + 1} of {PARTS}\n{text}\n", "a" if part else "w")
            if not passed:
                print(text)
    return int(failed)


def _keep(text: str, mode: str) -> None:
    if folder := os.environ.get(OUT):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with (Path(folder) / "tests.log").open(mode) as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
