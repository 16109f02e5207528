"""The remembered launch is Triton's own launch, of the same kernel with the same values."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_what_is_remembered_is_what_triton_takes():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "tests.launching"]
    result = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
