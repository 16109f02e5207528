"""Every shipped kernel configuration compiles for every target and spills nothing."""

import json

import pytest

from tests.conftest import AOT_TARGETS as TARGETS

pytest.importorskip("triton")
pytest.importorskip("typer")
pytest.importorskip("rich")

from tritonparam.kernels.gemm import FORMS

KINDS = ("skew", "symmetric")
# Shared memory one program may use, CUDA C++ Programming Guide, table of technical
# specifications (163 KiB on 8.0, 227 KiB on 9.0 and 10.0); LDS of a CDNA 3 compute unit.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@pytest.fixture(scope="module")
def rows(compiled):
    code, out, err = compiled
    assert code == 0, err
    assert "compiling" in err
    content = json.loads(out)
    assert list(content) == ["kernels"]
    return content["kernels"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_is_compiled(rows, target):
    assert all(list(row) == ["name", "target", "regs", "stack", "shared"] for row in rows)
    names = [row["name"] for row in rows if row["target"] == target]
    assert len(names) == len(set(names))
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        assert {f"cayley_fwd_{n}_{dtype}" for n in (8, 16, 32, 64)} <= set(names)
        assert {f"cayley_bwd_{n}_{dtype}" for n in (8, 16, 32, 64)} <= set(names)
        for map_ in ("spectral_norm", "weight_norm"):
            for way in ("fwd", "bwd"):
                start = f"{map_}_{way}_rows_8x512_"
                assert any(x.startswith(start) and x.endswith(dtype) for x in names)
        assert {f"skew_{dtype}", f"symmetric_{dtype}"} <= set(names)
    for way in ("fwd", "bwd"):
        assert {f"{kind}_exp_{way}_{n}_fp32" for kind in KINDS for n in (8, 16, 32)} <= set(names)
    for dtype in ("fp32", "fp64"):
        assert f"newton_schulz_{dtype}" in names
        for form in FORMS:
            assert any(name.startswith(f"product_{form}_") for name in names)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(rows, target):
    assert [row for row in rows if row["target"] == target and row["stack"] > 0] == []


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits(rows, target):
    limit = SHARED_LIMIT[target]
    assert [row for row in rows if row["target"] == target and row["shared"] > limit] == []
