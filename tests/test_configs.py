"""The table of measured paths and configurations: what it answers, and what it costs to ask."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import pytest
import torch

import tritonparam as tp
from tritonparam import configs, tables

ROW = {
    "device": configs.device_name(torch.device("cpu")),
    "dtype": "float32",
    "chain": "cayley",
    "n": 48,
    "batch": 1,
    "path": "kernel",
    "config": {"fwd": {"num_warps": 2}},
}
CLOSED = ROW | {"chain": "skew_exp", "path": "closed", "config": {}}


@dataclass(frozen=True)
class Launch:
    block: int
    num_warps: int = 1


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Puts a table, or any text, into the place of the one that is shipped."""

    def write(*rows, text=None):
        file = tmp_path / "tuned_configs.json"
        file.write_text(json.dumps({"format": 1, "rows": rows}) if text is None else text)
        monkeypatch.setattr(tables, "SHIPPED", file)
        configs.reload()

    yield write
    monkeypatch.undo()
    configs.reload()


def test_the_shipped_table_can_be_read():
    assert isinstance(tables.parse(tables.SHIPPED.read_text()), dict)


def test_a_row_speaks_for_its_sizes_alone(write):
    write(ROW, CLOSED)
    for n in (33, 48, 50, 64):
        x = torch.zeros(n, n)
        assert configs.lookup("cayley", x, n) == tables.Choice("kernel", ROW["config"])
    for n in (0, 1, 32, 65, 128):
        assert configs.lookup("cayley", torch.zeros(n, n), n) is None
    x = torch.zeros(64, 64)
    assert configs.lookup("skew_exp", x, 64).path == "closed"
    assert configs.lookup("symmetric_exp", x, 64) is None


def test_a_row_speaks_for_its_batches_alone(write):
    write(ROW | {"batch": 6})
    for size, found in ((1, False), (4, False), (5, True), (8, True), (9, False)):
        assert (configs.lookup("cayley", torch.zeros(size, 48, 48), 48) is not None) == found


@pytest.mark.parametrize("dtype", tp.registry.DTYPES, ids=str)
def test_a_row_speaks_for_its_dtype_alone(write, dtype):
    """What spills, fits and is right in one dtype need not in another that computes in fp32 too."""
    write(ROW | {"dtype": str(dtype).removeprefix("torch.")})
    for other in tp.registry.DTYPES:
        found = configs.lookup("cayley", torch.zeros(2, 2, dtype=other), 48)
        assert (found is not None) == (other == dtype)


def test_a_row_speaks_for_its_number_of_threads_alone(write):
    threads = torch.get_num_threads()
    write(ROW)
    x = torch.zeros(2, 2)
    torch.set_num_threads(threads + 1)
    try:
        assert configs.lookup("cayley", x, 48) is None
    finally:
        torch.set_num_threads(threads)
    configs.reload()
    assert configs.lookup("cayley", x, 48)


def test_another_device_does_not_match(write, monkeypatch):
    write(ROW)
    monkeypatch.setattr(configs, "device_name", lambda device: f"another {device.type}")
    assert configs.lookup("cayley", torch.zeros(2, 2), 48) is None
    assert configs.lookup("cayley", torch.zeros(2, 2, device="meta"), 48) is None


def test_launch_replaces_what_the_row_names(write):
    write(ROW)
    x = torch.zeros(2, 2)
    asked = []

    def default(n, dtype, block=64):
        asked.append((n, dtype))
        return Launch(block, num_warps=4)

    assert configs.launch("cayley", "fwd", x, default, 50, x.dtype) == Launch(64, 2)
    assert configs.launch("cayley", "bwd", x, default, 50, x.dtype) == Launch(64, 4)
    assert configs.launch("cayley", "fwd", x, default, 20, x.dtype) == Launch(64, 4)
    assert configs.launch("cayley", "fwd", x, default, 20, x.dtype, 32) == Launch(32, 4)
    before = list(asked)
    assert configs.launch("cayley", "fwd", x, default, 50, x.dtype) == Launch(64, 2)
    assert asked == before  # remembered


def test_the_table_gives_way_to_use_path_and_to_compilers(write, monkeypatch):
    write(CLOSED)
    x = torch.zeros(2, 2)
    assert tp.paths.measured("skew_exp", x, 64) == "closed"
    assert tp.paths.measured("cayley", x, 64) == ""
    with tp.use_path("kernel"):
        assert tp.paths.measured("skew_exp", x, 64) == ""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert tp.paths.measured("skew_exp", x, 64) == ""


MALFORMED = {
    "": "Expecting value",
    "[]": "an object with format 1",
    '{"format": 2, "rows": []}': "an object with format 1",
    '{"format": 1}': "rows must be a list",
    '{"format": 1, "rows": [3]}': "a row must have device, dtype, chain, n, batch, path, config",
}
MALFORMED |= {
    json.dumps({"format": 1, "rows": rows}): reason
    for rows, reason in (
        ([ROW, ROW | {"n": 64}], "two rows speak for the same sizes"),
        ([{key: ROW[key] for key in ROW if key != "n"}], "a row must have"),
        ([ROW | {"n": 0}], "no such"),
        ([ROW | {"n": True}], "n must be a JSON int"),
        ([ROW | {"dtype": "int8"}], "no such dtype"),
        ([ROW | {"path": "fast"}], "no such"),
        ([ROW | {"path": "closed"}], "only a kernel has a config"),
        ([ROW | {"config": {"forward": {}}}], "objects under fwd and bwd"),
        ([ROW | {"config": {"fwd": 3}}], "objects under fwd and bwd"),
    )
}


@pytest.mark.parametrize(("text", "reason"), MALFORMED.items())
def test_a_malformed_table_is_a_warning_and_no_table(write, text, reason):
    with pytest.raises(ValueError, match=reason):
        tables.parse(text)
    write(text=text)
    with pytest.raises(UserWarning, match=r"tuned_configs\.json is not used"):  # ours are errors
        configs.lookup("cayley", torch.zeros(2, 2), 48)
    configs.reload()
    with pytest.warns(UserWarning, match="takes the default"):
        assert configs.lookup("cayley", torch.zeros(2, 2), 48) is None
    assert configs.lookup("cayley", torch.zeros(2, 2), 8) is None  # warned once


def test_a_missing_table_is_a_warning(write):
    write()
    tables.SHIPPED.unlink()
    with pytest.warns(UserWarning, match="is not used"):
        assert configs.lookup("cayley", torch.zeros(2, 2), 48) is None


def test_a_number_that_the_kernel_does_not_have(write):
    write(ROW | {"config": {"fwd": {"num_wraps": 2}}})
    with pytest.warns(UserWarning, match="num_wraps"):
        assert configs.launch("cayley", "fwd", torch.zeros(2, 2), Launch, 48) == Launch(48)


@pytest.mark.parametrize("rows", [(), (ROW, CLOSED)])
def test_asking_costs_little_beside_reading_a_weight(write, rows):
    def least(call):  # others use this machine too
        call()
        times = []
        for _ in range(200):
            start = time.perf_counter()
            for _ in range(20):
                call()
            times.append((time.perf_counter() - start) / 20)
        return min(times)

    write(*rows)
    x = torch.zeros(2, 2)
    layer = tp.register_parametrization(torch.nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())
    with torch.no_grad():
        reading = least(lambda: layer.weight)
    for ask in (
        lambda: configs.lookup("cayley", x, 50),
        lambda: configs.fastest("cayley", x, 50),
        lambda: configs.launch("cayley", "fwd", x, Launch, 50),
    ):
        assert least(ask) < 0.05 * reading


@pytest.mark.parametrize(
    ("chain", "link"), [("cayley", tp.CayleyMap), ("skew_exp", tp.MatrixExponential)]
)
def test_a_chain_takes_the_path_of_the_table(write, monkeypatch, chain, link):
    layer = tp.register_parametrization(torch.nn.Linear(4, 4), "weight", tp.Skew(), link())
    row = ROW | {"chain": chain, "n": 4, "path": "composed", "config": {}}
    write(row)
    layer.weight.sum().backward()
    assert tp.stats(reset=True)["composed"] == 1
    assert "measured faster" in tp.explain(layer)[0].reason
    with tp.use_path("closed"):
        layer.weight
    assert tp.stats(reset=True) == {"kernel": 0, "closed": 1, "composed": 0}
    compiled = torch.compile(lambda: layer.weight, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(), layer.weight, atol=1e-6)

    monkeypatch.setattr(tp.paths, "device_declines", lambda x: "")
    write(row | {"path": "closed"})
    tp.stats(reset=True)
    layer.weight
    assert tp.stats(reset=True)["closed"] == 1
    assert "the closed form was measured faster at n = 4" in tp.explain(layer)[0].reason

    monkeypatch.setattr(tp.paths, "kernels", pytest.fail)
    write(row | {"path": "closed", "dtype": "bfloat16", "batch": 2})
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.bfloat16))
    tp.register_parametrization(layer, "weight", tp.Skew(), link())
    layer.weight.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("based", [False, True], ids=["free", "base"])
def test_the_kernel_is_launched_with_the_numbers_of_the_table(write, monkeypatch, dtype, based):
    kernels = pytest.importorskip("tritonparam.kernels.cayley")
    launched = []

    def launch(*args, launch=configs.launch, **more):
        launched.append(launch(*args, **more))
        return launched[-1]

    monkeypatch.setattr(configs, "launch", launch)
    numbers = {"fwd": {"block_matrices": 1}, "bwd": {"num_warps": 2}}
    write(ROW | {"n": 4, "config": numbers, "dtype": str(dtype).removeprefix("torch.")})
    monkeypatch.setattr(configs, "device_name", lambda device: ROW["device"])
    links = [tp.Orthogonal("cayley")] if based else [tp.Skew(), tp.CayleyMap()]
    layer = tp.register_parametrization(torch.nn.Linear(4, 4), "weight", *links)
    with tp.use_path("kernel"):
        layer.to("cuda" if torch.cuda.is_available() else "cpu", dtype).weight.sum().backward()
    assert launched[0] == replace(kernels.fwd_config(4, dtype), block_matrices=1)
    assert launched[1] == replace(kernels.bwd_config(4, torch.float32), num_warps=2)
