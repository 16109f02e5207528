"""The options that every demo takes, and how it says that one is not what it must be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch


class BadOption(ValueError):
    """An option has a value that the demo cannot run with."""


class MissingPackage(ImportError):
    """A package that only the demos need is not installed."""


@dataclass(frozen=True)
class Options:
    """What every demo takes.

    Attributes:
        output: where the plot goes, a PNG in a folder that exists.
        steps, batch: of each run, at least 1.
        lr: the learning rate at the start, positive.
        device: where to train; None is cuda where there is one, else the CPU.
        threads: of the CPU, at least 1. More save little on idle cores, and make a step many times
            longer where the cores are shared.
        seed: of the weights and of all that is drawn.
        quiet: print only what fusing gained and where the plot is.
    """

    output: Path
    steps: int
    batch: int
    lr: float
    device: str | None = None
    threads: int = 1
    seed: int = 0
    quiet: bool = False

    def place(self) -> torch.device:
        """The device; raises BadOption where an option is not what it must be."""
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(self.batch >= 1, "batch", "at least 1", self.batch)
        require(0 < self.lr < math.inf, "lr", "positive and finite", self.lr)
        require(self.threads >= 1, "threads", "at least 1", self.threads)
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1", self.seed)
        folder, is_png = self.output.parent, self.output.suffix.lower() == ".png"
        is_file = is_png and not self.output.is_dir()
        require(is_file, "output", "the name of a .png file", str(self.output))
        writable = folder.is_dir() and os.access(folder, os.W_OK)
        require(writable, "output", "in a folder that exists and can be written", str(self.output))
        return _device(self.device)

    def progress(self) -> Callable[[range], Iterable[int]]:
        """Wraps the range of steps in a bar; asks for the plot's packages before the training."""
        try:
            import matplotlib  # noqa: F401
            from rich.console import Console
            from rich.progress import track
        except ModuleNotFoundError as error:
            raise missing(error.name or "matplotlib", error) from None
        screen = Console(stderr=True)
        return lambda steps: track(
            steps, "composed and fused in turn", console=screen, disable=self.quiet
        )


def require(fulfilled: bool, option: str, wanted: str, got: object) -> None:
    """Raise BadOption where an option is not what it must be."""
    if not fulfilled:
        raise BadOption(f"--{option} must be {wanted}, got {got!r}.")


def missing(package: str, error: ModuleNotFoundError) -> MissingPackage:
    """The error that a package is not installed, and the way out."""
    return MissingPackage(f"the demos need {package} ({error}); pip install 'tritonparam[demo]'")


def _device(name: str | None) -> torch.device:
    """The device of that name, if it can compute."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadOption(
            f"--device must be a device of this machine, such as cpu or cuda, got {name!r}."
        ) from None
    return device
