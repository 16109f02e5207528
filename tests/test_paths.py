"""The path that every fused weight is set to, by a block or by the environment, and the counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import tritonparam as tp
from tests.test_fuse import evaluated, fused_layer


def test_use_path_and_stats(device, fused_path):
    layer = fused_layer().to(device)
    assert evaluated(layer) == {fused_path: 1}
    with tp.use_path("composed"):
        assert evaluated(layer) == {"composed": 1}
        with tp.use_path("closed"):
            assert evaluated(layer) == {"closed": 1}
            assert tp.explain(layer)[0].path == "closed"
        assert evaluated(layer) == {"composed": 1}
        assert tp.explain(layer)[0].reason == "the path is set to composed"
    with tp.use_path("kernel"):
        assert evaluated(layer) == {"kernel": 1}
        big = torch.zeros(1, device=device).expand(4097, 4097)
        with pytest.raises(RuntimeError, match=r"n = 4097 is beyond the kernel's 4096"):
            tp.functional.skew_cayley(big)
    assert evaluated(layer) == {fused_path: 1}
    with (
        pytest.raises(ValueError, match="one of kernel, closed, composed, got 'fast'"),
        tp.use_path("fast"),
    ):
        pass
    tp.stats(reset=True)
    assert tp.stats() == {"kernel": 0, "closed": 0, "composed": 0}


@pytest.mark.parametrize(
    ("value", "output"), [("composed", "1"), ("closed", "0"), ("nonsense", "TRITONPARAM_PATH")]
)
def test_environment_switch(value, output):
    code = (
        "import tritonparam as tp, torch;"
        "m = torch.nn.Linear(3, 3);"
        "tp.register_parametrization(m, 'weight', tp.Skew(), tp.CayleyMap());"
        "tp.stats(reset=True); m.weight; print(tp.stats()['composed'])"
    )
    env = dict(os.environ, TRITONPARAM_PATH=value)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert output in run.stdout + run.stderr
    assert (run.returncode == 0) == (value != "nonsense")
