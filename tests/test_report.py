"""What the report writes of rows, and the line and the plots beside them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import goals, machine, report
from benchmarks.cases import CUDA


def test_the_report_folds_what_stands_beside_the_times():
    base = {"chain": "cayley", "shape": [64, 64], "phase": "forward+backward"}
    base["speedup_over_composed"] = 2.0
    none = {"median_us": None, "timed": "none: it runs out of memory"}
    host = {"median_us": 90.0, "host_median_us": 80.0}
    graph = {"phase": "forward+backward, graph", "contender": "kernel", "timed": "graph replay"}
    peer = {"median_us": 5131.8, "speedup_of_ours": 4.745, "constraint_error": 2.1e-7}
    rows = [
        base | host | {"contender": "composed", "peak_bytes": 131_328},
        base | host | {"contender": "kernel", "peak_bytes": 82_256, "device_median_us": 12.0},
        base | graph | {"median_us": 10.0, "host_median_us": 3.0},
        base | peer | {"contender": "torch"},
        base | peer | {"contender": "peft", "constraint_error": 0.37, "approximate": True},
        base | none | {"contender": "geotorch"},
        base | host | {"contender": "kernel", "phase": "forward", "median_us": 31.0},
        base | host | {"contender": "kernel", "phase": "backward", "median_us": 64.5},
        base | host | {"contender": "peft", "phase": "forward", "median_us": 1000.0},
        base | graph | {"phase": "backward, graph", "median_us": 6.0},
    ]
    lines = report._more(rows)
    assert "| chain, shape | kernel | peft |" in lines
    assert "| cayley 64×64 | 0.031 / 0.0645 | 1 / – |" in lines
    assert "| cayley 64×64, graph | – / 0.006 | – |" in lines
    assert "| chain, shape | torch | peft |" in lines
    assert "| cayley 64×64 | 5.13, 4.75×, 2e-07 | 5.13, 4.75×, ≈ 4e-01 |" in lines
    assert "| chain, shape | composed | kernel |" in lines
    assert "| cayley 64×64 | 0.131 | 0.0823 |" in lines
    assert "| cayley 64×64 | 80 / – | 80 / 12 |" in lines
    assert "| cayley 64×64, graph | – | 3 / 10 |" in lines
    assert lines.count("</details>") == 4
    assert sum("64×64" in line for line in lines) == 6  # parts are in no table but their own
    assert len(report._times(rows[:3] + rows[6:], floors=False)) == 2
    assert report._more([{**base, "contender": "closed", "median_us": 1.0}]) == []


def test_the_first_table_has_the_least_and_the_most_of_each_chain():
    def case(n, gain, chain="cayley", phase="forward+backward", ours="closed", **more):
        base = {"chain": chain, "shape": [n, n], "phase": phase, "value_error": 1e-7}
        return [
            base | {"contender": "composed", "median_us": 1000.0 * n, "value_error": n * 1e-7},
            base | {"contender": ours, "median_us": 500.0, "speedup_over_composed": gain} | more,
        ]

    graph = case(8, 3.0, phase="forward+backward, graph", ours="kernel", value_error=3e-7)
    rows = [*case(64, 2.0), *case(8, 0.5), *case(16, 1.0), *case(8, 9.0, phase="forward"), *graph]
    rows += case(4, None, chain="tall_exp")  # without a baseline: in the table of every size
    assert report._gains(rows) == [
        "| cayley | 0.50× at 8×8: 8 → 0.5 ms | 2.00× at 64×64: 64 → 0.5 ms | 1e-07 (6e-06) |",
        "| cayley, graph | 3.00× at 8×8: 8 → 0.5 ms | – | 3e-07 (8e-07) |",
    ]
    assert report._milliseconds(3_970_400.0) == "3,970"
    assert [report._ratio(x) for x in (0.954, 99.5, 1307.0)] == ["0.95×", "99.50×", "1,307×"]


def test_aims_are_reached_missed_or_not_measured():
    def rows(shape, phase, **medians):
        base = {"shape": shape, "phase": phase, "floor_us": 10.0, "chain": "cayley"}
        base |= {"product_us": {"float32": 1.0, "3xtf32": 100.0}, "device_median_us": 500.0}
        return [base | {"contender": name, "median_us": us} for name, us in medians.items()]

    eager, graph = "forward+backward", "forward+backward, graph"
    small, one, large = [1024, 32, 32], [256, 256], [1024, 1024]
    cayley = rows(small, eager, composed=2000.0, compiled=1000.0, kernel=100.0)
    cayley += [r | {"timed": "graph replay"} for r in rows(small, graph, kernel=30.0)]
    cayley += rows(one, eager, composed=1000.0, kernel=500.0)
    replays = rows(one, graph, composed=7.0, compiled=800.0, kernel=100.0)
    cayley += [r | {"timed": "graph replay"} for r in replays]
    cayley += rows([128, 128], eager, composed=1000.0, compiled=800.0, kernel=500.0)
    cayley += rows(large, eager, composed=5000.0, compiled=4999.0, kernel=1000.0)
    read = [r | {"phase": "read"} for r in rows([64, 64], "", composed=9.0, kernel=10.0)]
    lines = goals.lines({"cayley": cayley, "read": read})
    n_rows = len(CUDA) - 1 + 1  # without weight norm, and with the read
    assert f"Aims: 2 of {n_rows} reached, {n_rows - 4} not measured" in lines[1]
    assert (
        "| cayley 1024×32×32 | 20.00× (≥ 20×) | 10.00× (≥ 10×) | 3.00× (≤ 3×) of the floor | yes |"
        in lines
    )
    assert (
        "| cayley 256×256, graph | 10.00× (≥ 10×) | 8.00× (≥ 8×) | 3.33× (≤ 4×) of the path | yes |"
        in lines
    )
    assert (
        "| cayley 128×128, graph | – (≥ 10×) | – (≥ 8×) | – (≤ 4×) of the path | not measured |"
        in lines
    )
    assert (
        "| cayley 1024×1024 | 5.00× (≥ 5×) | 5.00× (≥ 5×) | 1.67× (≤ 2×) of the products | no |"
        in lines
    )
    assert "| cayley 64×64, read | 0.90× (≥ 1×) | | | no |" in lines
    assert (
        "| spectral_norm 20 layers | – (≥ 10×) | – (≥ 4×) | – (≤ 2×) of the floor | not measured |"
        in lines
    )
    assert "| householder 4096×64 | – (≥ 50×) | – (≥ 50×) | | not measured |" in lines


def test_the_line_of_the_machine(monkeypatch):
    versions = {"device": "H100", "torch": "2.13.0", "triton": "3.9.0", "commit": "abc"}
    assert report._machine(versions) == "H100; torch 2.13.0, triton 3.9.0; commit abc."
    more = {"driver": "570.1", "peers": {"geotorch": "0.4.0"}}
    assert report._machine(versions | more) == (
        "H100, driver 570.1; torch 2.13.0, triton 3.9.0, geotorch 0.4.0; commit abc."
    )
    found = SimpleNamespace(stdout="570.1\n570.1\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: found)
    assert machine._driver() == "570.1"

    def absent(*a, **k):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine._driver() is None
    assert machine._commit() is None


def test_plots_show_what_the_rows_hold(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    def row(n, contender, speed, **more):
        base = {"shape": [n, n], "contender": contender, "phase": "forward+backward"}
        return base | {"speedup_over_composed": speed, "median_us": 50.0} | more

    kernels = [row(n, "kernel", n / 16, floor_us=0.5) for n in (64, 128, 256)]
    parts = [row(n, "kernel", 500.0, phase="backward") for n in (64, 128, 256)]
    graphs = [{**r, "phase": "forward+backward, graph", "floor_us": 5.0} for r in kernels]
    for r in graphs:
        r["speedup_over_composed"] *= 2
    composed = [row(n, "composed", 1.0) for n in (64, 128, 256)]
    rows = {"cayley": [*composed, *kernels, *parts, *graphs]}
    written = plots.draw(rows, "a device", tmp_path)
    assert [path.name for path in written] == ["speed.svg", "floor.svg"]
    for path, texts in zip(written, (("50×", "256", "cayley"), ("10 %", "cayley")), strict=True):
        assert all(f">{text}<" in path.read_text() for text in texts), path
        assert "a device" in path.read_text()
        assert "100×" not in path.read_text()  # of the backward pass alone
        assert path.with_suffix(".png").stat().st_size > 5000
    assert plots.draw({}, "a device", tmp_path) == []
