"""Every kernel under compute-sanitizer's memcheck and racecheck: ``python -m tests.sanitize``.

Where the tool is neither on PATH nor in the CUDA toolkit it prints one line and does nothing.
Memory is allocated tensor by tensor, so that memcheck sees where each one ends. Shapes are those of
``tests/test_chains.py``, which has had the kernels compiled: all chains at one, then at the next.
So has ``tests/test_rounds.py`` those of rounds in one launch, which no default runs.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path

import torch

import tritonparam as tp
from tests.cases import CASES, fused
from tests.processes import Processes
from tritonparam import configs

TOOLS = ("memcheck", "racecheck")
SECONDS = 60  # of both tools, at once; it slows a kernel down by one to two orders of magnitude
# Columns and batches: masked and full tiles, several tiles, several matrices in one program, one.
SIZES = ((17,), (64,), (100,), (5, 7), (3, 160), (1,))
ROUNDS_N = 100
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def main(arguments: list[str]) -> int:
    """Run both tools and return 1 if one finds an error; ``--inside`` is what they run."""
    if arguments == ["--inside"]:
        cuda = torch.cuda.is_available()
        for line in launch("cuda" if cuda else "cpu", SIZES if cuda else ((3,),)):
            print(line, flush=True)
        return 0
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer: skipped, it is neither on PATH nor in the CUDA toolkit's folder")
        return 0
    found = 0
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with Processes() as running:
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            command += [sys.executable, "-m", "tests.sanitize", "--inside"]
            running.start(command, env=environment)
        for tool, status in zip(TOOLS, running.wait(time.monotonic() + SECONDS), strict=True):
            ended = f"was stopped after {SECONDS} seconds" if status is None else "has ended"
            print(f"compute-sanitizer: {tool} {ended}, {'an error' if status else 'no error'}")
            found |= bool(status)
    return int(found)


def find() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def launch(device: str, sizes: tuple[tuple[int, ...], ...]) -> Iterator[str]:
    """Forward and backward of every chain by its kernels, where they take it: a line of each."""
    for dtype, (*batch, n), case in product(DTYPES, sizes, CASES):
        if n > case.max_kernel_n:
            continue
        shape = case.shape(n, *batch)
        module = case.module(case.original(shape, 1.0, dtype).to(device))
        with tp.use_path("kernel"):
            (row,) = tp.explain(module)
        if row.path != "kernel":
            continue
        tried = one_launch(case.name, device) if dtype == torch.float32 and n == ROUNDS_N else []
        for said, way in (("", nullcontext()), *tried):
            with way:
                fused(module, torch.randn(shape, device=device).to(dtype), "kernel")
            if device == "cuda":
                torch.cuda.synchronize()
            yield f"{case.name} {shape} {dtype}{said}"


def one_launch(chain: str, device: str) -> list[tuple[str, AbstractContextManager]]:
    """What has a map of ROUNDS_N rows carry out its rounds in one launch, as no default does."""
    if chain not in ("cayley", "skew_exp", "symmetric_exp"):
        return []
    numbers = {"num_warps": 8, "programs": 64} if device == "cuda" else {"programs": 1}
    row = {"device": configs.device_name(torch.device(device)), "dtype": "float32", "chain": chain}
    phases = ("fwd",) if chain == "cayley" else ("fwd", "bwd")
    config = {phase: numbers for phase in phases}
    row |= {"n": ROUNDS_N, "batch": 1, "path": "kernel", "config": config}
    return [(", one launch", configs.trying(row))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
