"""Every kernel under compute-sanitizer's memcheck and racecheck: ``python -m tests.sanitize``.

Where the tool is neither on PATH nor in the CUDA toolkit it prints one line and does nothing.
Memory is allocated tensor by tensor, so that memcheck sees where each one ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import tritonparam as tp
from tests.cases import CASES, fused

TOOLS = ("memcheck", "racecheck")
SECONDS = 60  # of both tools, at once; it slows a kernel down by one to two orders of magnitude


def main(arguments: list[str]) -> int:
    """Run both tools and return 1 if one finds an error; ``--inside`` is what they run."""
    if arguments == ["--inside"]:
        cuda = torch.cuda.is_available()
        launched = launch("cuda" if cuda else "cpu", (5, 17, 33, 64, 130) if cuda else (3,))
        print(f"{len(launched)} launches: {', '.join(dict.fromkeys(launched))}")
        return 0
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer: skipped, it is neither on PATH nor in the CUDA toolkit's folder")
        return 0
    with ThreadPoolExecutor() as pool:
        return max(pool.map(lambda tool: _under(sanitizer, tool), TOOLS))


def find() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def launch(device: str, sizes: tuple[int, ...]) -> list[str]:
    """Forward and backward of every chain by its kernels, where they take these sizes."""
    launched = []
    for case in CASES:
        for n in sizes:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                if n > case.max_kernel_n:
                    continue
                shape = case.shape(n, 3)
                module = case.module(case.original(shape, 1.0, dtype).to(device))
                with tp.use_path("kernel"):
                    (row,) = tp.explain(module)
                if row.path == "kernel":
                    fused(module, torch.randn(shape, device=device).to(dtype), "kernel")
                    launched.append(case.name)
    if device == "cuda":
        torch.cuda.synchronize()
    return launched


def _under(sanitizer: str, tool: str) -> int:
    """Run what is inside under one tool; 0 where it finds nothing, or is too slow to tell."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    command += [sys.executable, "-m", "tests.sanitize", "--inside"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(f"compute-sanitizer: {tool}", flush=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"compute-sanitizer: {tool} was stopped after {SECONDS} seconds, nothing found")
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
