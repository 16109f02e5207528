"""Every shipped kernel configuration compiles for every target and spills nothing."""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

pytest.importorskip("triton")
pytest.importorskip("typer")
pytest.importorskip("rich")

from tritonparam.kernels.aot import SHARED_LIMIT, TARGETS
from tritonparam.kernels.gemm import FORMS

KINDS = ("skew", "symmetric")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The rows of ``tritonparam info --kernels --json`` for every target, one command for a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    found = folder / "kernels.json"
    with FileLock(folder / "kernels.lock"):
        if not found.exists():
            found.write_text(_compiled(folder / "triton"))
    content = json.loads(found.read_text())
    assert list(content) == ["kernels"]
    assert {row["target"] for row in content["kernels"]} == set(TARGETS)
    return content["kernels"]


def _compiled(cache) -> str:
    command = [sys.executable, "-m", "tritonparam", "info", "--kernels", "--json"]
    for target in TARGETS:
        command += ["--target", target]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "compiling" in run.stderr
    return run.stdout


@pytest.fixture(params=TARGETS)
def rows(request, compiled):
    return [row for row in compiled if row["target"] == request.param]


def test_every_configuration_is_compiled(rows):
    assert all(list(row) == ["name", "target", "regs", "stack", "shared"] for row in rows)
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        assert {f"cayley_fwd_{n}_{dtype}" for n in (8, 16, 32, 64)} <= set(names)
        assert {f"cayley_bwd_{n}_{dtype}" for n in (4, 8, 16, 32, 64)} <= set(names)
        for map_ in ("spectral_norm", "weight_norm"):
            for way in ("fwd", "bwd"):
                start = f"{map_}_{way}_rows_8x512_"
                assert any(x.startswith(start) and x.endswith(dtype) for x in names)
        for kind in KINDS:
            assert any(x.startswith(f"{kind}_square_") and x.endswith(dtype) for x in names)
    for way in ("fwd", "bwd"):
        for kind in KINDS:
            assert {f"{kind}_exp_{way}_{n}_fp32" for n in (4, 8, 16, 32)} <= set(names)
            assert {f"{kind}_exp_{way}_{n}_fp64" for n in (16, 32, 64)} <= set(names)
            half = "bf16" if kind == "skew" else "fp16"
            assert {f"{kind}_exp_{way}_64_{dtype}" for dtype in (half, "fp32")} <= set(names)
    for form in ("skew", "lower", "triangle"):
        assert {f"inverse_{form}_{k}" for k in (32, 64)} <= set(names)
    assert {"taylor_rows", "taylor_rows_scheduled", "tall_twice", "tall_columns"} <= set(names)
    assert {f"tall_exp_{way}_fp32" for way in ("fwd_8", "fwd_16", "bwd_8")} <= set(names)
    for dtype in ("fp32", "fp64"):
        for sums in ("tall_gram_below_below", "tall_gram_unit_unit", "tall_combine"):
            assert {f"{sums}_{k}_{dtype}" for k in (32, 64)} <= set(names)
        assert f"newton_schulz_{dtype}" in names
        for form in FORMS:
            assert any(name.startswith(f"product_{form}_") for name in names)
    one_launch = {f"{name}_rounds_32_fp32" for name in ("cayley", *(f"{x}_exp_bwd" for x in KINDS))}
    assert one_launch <= set(names) or rows[0]["target"].startswith("gfx")


def test_nothing_spills(rows):
    assert [row for row in rows if row["stack"] > 0] == []


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["target"]]] == []
