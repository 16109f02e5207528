"""The accuracy table on its small sizes: within its bounds, and what the summary says of it."""

from __future__ import annotations

from benchmarks import accuracy


def test_every_cell_is_within_its_bound(capsys):
    assert accuracy.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert " !" not in printed
    assert "skew_exp orthogonality: 35 of 35 cells within" in printed


def test_a_cell_beyond_its_bound_is_marked():
    rows = [
        {
            "chain": "cayley",
            "n": 2,
            "norm": 1.0,
            "what": "value",
            "torch": t,
            "ours": o,
            "within": w,
        }
        for t, o, w in ((1e-7, 4e-7, True), (1e-6, 2e-6, False))
    ]
    assert accuracy.allowed(1e-7) == 5e-7
    assert accuracy.allowed(1e-6) == 1.5e-6
    assert "cayley value: 1 of 2 cells within" in accuracy.summary(rows)
