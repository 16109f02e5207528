"""What is timed: the chains of ``tests/cases.py`` at the sizes that people run."""

from __future__ import annotations

from tests.cases import CASES, Case

# Most valuable first: a time budget cuts the list off at its end.
SHAPES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "cayley": {
        "cpu": ((64, 32, 32), (64, 64), (128, 128), (256, 256), (512, 512)),
        "cuda": (
            (1024, 32, 32),
            (4096, 16, 16),
            (1024, 64, 64),
            (64, 64),
            (4096, 8, 8),
            (64, 32, 32),
            (128, 128),
            (256, 256),
            (512, 512),
        ),
    },
}


def rows(kind: str) -> list[tuple[Case, tuple[int, ...]]]:
    """The chains and shapes timed on a kind of device, "cpu" or "cuda"."""
    return [(case, shape) for case in CASES for shape in SHAPES[case.name][kind]]
