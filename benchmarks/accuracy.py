"""Errors against fp64 over sizes and norms: ``python -m benchmarks.accuracy [--quick]``.

For every cell it prints the error of torch's own chain and of ours in fp32: relative Frobenius
errors of the value and of the gradient for a gradient ~ N(0, 1), and ‖QᵀQ - I‖_F / √n. A cell is
marked where ours exceeds max(1.5 × torch's, 5e-7). Where exp overflows fp32 a cell is left out.
The table goes to ``benchmarks/results/<device>/accuracy.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from tests.cases import CASES, Case, composed, fused

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)
NORMS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
CHAINS = ("cayley", "skew_exp", "symmetric_exp")


def allowed(torchs: float) -> float:
    """How far off ours may be."""
    return max(1.5 * torchs, 5e-7)


def _relative(x: Tensor, reference: Tensor) -> float:
    """Of a batch as a whole: one small matrix is as exact as rounding happens to be."""
    return float((x.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def _defect(q: Tensor) -> float:
    q = q.double()
    eye = torch.eye(q.size(-1), dtype=q.dtype)
    return float((q.mT @ q - eye).norm() / (q.numel() / q.size(-1)) ** 0.5)


def cells(case: Case, n: int, norm: float) -> list[dict[str, Any]]:
    """The cells of one size and norm: value, gradient and, for orthogonal chains, orthogonality."""
    torch.manual_seed(0)
    shape = (max(1, 64 // n), n, n)
    module = case.module(case.original(shape, norm, torch.float32))
    g = torch.randn(shape)
    y64, dw64 = composed(module, g)
    y32, dw32 = composed(module, g, torch.float32)
    y, dw = fused(module, g, "closed")
    errors = {
        "value": (_relative(y32, y64), _relative(y, y64)),
        "gradient": (_relative(dw32, dw64), _relative(dw, dw64)),
    }
    if case.name != "symmetric_exp":
        errors["orthogonality"] = (_defect(y32), _defect(y))
    return [
        {
            "chain": case.name,
            "n": n,
            "norm": norm,
            "what": what,
            "torch": float(f"{torchs:.1e}"),
            "ours": float(f"{ours:.1e}"),
            "within": ours <= allowed(torchs),
        }
        for what, (torchs, ours) in errors.items()
    ]


def summary(rows: list[dict[str, Any]]) -> str:
    """One line per chain and quantity: cells within the bound, cells better, the largest ratio."""
    lines = []
    for chain in CHAINS:
        for what in ("value", "orthogonality", "gradient"):
            some = [row for row in rows if row["chain"] == chain and row["what"] == what]
            if not some:
                continue
            within = sum(row["within"] for row in some)
            better = sum(row["ours"] < row["torch"] for row in some)
            lines.append(
                f"{chain} {what}: {within} of {len(some)} cells within max(1.5 × torch, 5e-7), "
                f"{better} better than torch"
            )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the table; return 1 if a cell is beyond its bound. ``--quick``: n <= 32, no file."""
    quick = arguments == ["--quick"]
    rows = []
    for case in [case for case in CASES if case.name in CHAINS]:
        for n in SIZES:
            for norm in NORMS:
                if norm > case.max_norm or (quick and n > 32):
                    continue
                found = cells(case, n, norm)
                rows += found
                texts = [
                    f"{row['what']} {row['torch']:.1e} / {row['ours']:.1e}"
                    f"{'' if row['within'] else ' !'}"
                    for row in found
                ]
                print(f"{case.name:14} n = {n:<4} norm {norm:<6g} " + ", ".join(texts), flush=True)
    print("(torch / ours)\n" + summary(rows))
    if not quick:
        folder = Path(__file__).parent / "results" / machine.folder("cpu")
        folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine.describe("cpu"), "rows": rows}
        (folder / "accuracy.json").write_text(json.dumps(content, indent=1) + "\n")
    return int(not all(row["within"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
