"""Measuring which path, and which launch configuration, is fastest for given weights."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tritonparam import configs, failures, info, registry, samples, tables, trials
from tritonparam.declared import table
from tritonparam.fuse import links_of, originals, parametrized_tensors, require_module
from tritonparam.trials import Clock, Trial

# What replaces the default takes at most this share of its time, and less than all of it in three
# rounds of four, or in all of few. On two processors with a load of 12, a path measured against
# itself won so in 4 of 45 runs where three of four were enough of few rounds too; by the ratio of
# two medians, each of all rounds, it gained as much in 19.
GAIN = 0.95
LARGEST_COMPOSED = 2048  # rows beyond which torch's n × n matrices are not waited for


@dataclass(frozen=True)
class Tuning:
    """What was tried for weights of one chain, size, batch, dtype and device.

    Attributes:
        row: what a table says of them: the fastest path and its configuration.
        trials: in the order in which they were tried; the first is the default.
        floor: the share of the fastest time in which as many bytes are copied as forward and
            backward cannot but move; None where nothing was measured.
    """

    row: tables.Row
    trials: tuple[Trial, ...]
    floor: float | None = None

    def __str__(self) -> str:  # noqa: D105
        row = self.row
        title = f"{row['chain']}, {row['batch']} of n = {row['n']}, {row['dtype']}, {row['device']}"
        cells = [("", "path", "configuration", "registers", "shared bytes", "µs", "of default")]
        for trial in self.trials:
            chosen = self.floor is not None and (trial.path, trial.config) == (
                row["path"],
                row["config"],
            )
            numbers = [
                f"{phase} {key}={value}"
                for phase, config in trial.config.items()
                for key, value in config.items()
            ]
            used = trial.resources or {}
            cells.append(
                (
                    "→" if chosen else "",
                    trial.path,
                    ", ".join(numbers) or ("default" if trial.path == "kernel" else ""),
                    str(used.get("regs", "")),
                    str(used.get("shared", "")),
                    f"{trial.microseconds:.1f}" if trial.microseconds else "–",
                    f"{trial.ratio:.2f}" if trial.ratio else "–",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [textwrap.fill(title, 80, subsequent_indent="  ")]
        for cell, reason in zip(cells, ["", *(t.reason for t in self.trials)], strict=True):
            left = [c.ljust(w) for c, w in zip(cell[:3], widths[:3], strict=True)]
            right = [c.rjust(w) for c, w in zip(cell[3:], widths[3:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
            if reason:
                lines.append(f"      {reason}")
        if self.floor is not None:
            lines.append(f"moving the bytes takes {self.floor:.0%} of the fastest")
        return "\n".join(lines)


def tune(
    model: nn.Module,
    *,
    again: bool = False,
    file: Path | None = None,
    clock: Clock | None = None,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Tuning]:
    """Measure the paths and launch configurations of a model's weights on their device.

    Every kind of weight, of one chain, size, batch and dtype, is measured once, on copies: the
    model is not changed. The fastest goes into the user's own table as soon as it is known, where
    every later process finds it, so that an interrupted run goes on where it was.

    Arguments:
        model: holds fused parametrizations; what no rule takes as a whole is left out.
        again: measure what the table knows already.
        file: the table; None is the user's own, ``tables.users_file()``.
        clock: called with a step; runs it and returns its seconds. None is the device's.
        track: wraps the sequence of what is measured, for a progress bar.

    Returns:
        What was measured now, a ``Tuning`` for each kind of weight.

    Raises:
        TypeError: `model` is not an ``nn.Module``.
        ValueError: it has no weight that a rule takes, or there is no table that can be written.

    >>> import tempfile
    >>> import tritonparam as tp
    >>> layer = tp.register_parametrization(nn.Linear(3, 3), "weight", tp.Skew(), tp.CayleyMap())
    >>> found = tune(layer, file=Path(tempfile.mkdtemp(), "tuned.json"))
    >>> sorted(trial.path for trial in found[0].trials)
    ['closed', 'composed']
    """
    require_module("tune", model)
    file = file or tables.users_file()
    if file is None:
        raise ValueError(
            f"tune: there is no table to write to, since {tables.no_table()}; "
            "set TRITONPARAM_CACHE_DIR to a folder of yours or pass file=."
        )
    kinds: dict[tables.Key, tuple[registry.Rule, ParametrizationList]] = {}
    for _, _, plist in parametrized_tensors(model):
        if rule := rule_of(plist):
            kinds.setdefault(tables.key(_row(rule, plist)), (rule, plist))
    if not kinds:
        raise ValueError(
            "tune: the model has no weight whose whole chain a rule takes; "
            "call tritonparam.fuse(model), and explain(model) says why not."
        )
    known = tables.read(file)
    new = [kinds[key] for key in kinds if again or key not in known]
    if new:
        tables.require_writable(file)
        failures.forget()
    found = []
    for rule, plist in track(new):
        found.append(_measured(rule, plist, clock or trials.clock_of(originals(plist)[0].device)))
        if found[-1].floor is not None:  # or none was right
            tables.store([found[-1].row], file)
            configs.reload()
    return found


def weight(chain: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> nn.Module:
    """A module whose weight is random and under a chain of the table of rules.

    Raises ValueError where there is no such chain, or its links take more than a shape to make.
    """
    if chain not in samples.SQUARE:
        raise ValueError(
            f"tune: the chain must be one of {', '.join(samples.SQUARE)}, got {chain!r}; "
            "others are tuned with a model that has them."
        )
    return samples.weight(chain, tuple(shape), dtype, device)


def static(chain: str, n: int, dtype: torch.dtype, target: str) -> Tuning:
    """Compile every candidate for a GPU, present or not, and discard what cannot be fast.

    Discarded is what does not compile, what spills registers, and what needs more shared memory
    than the GPU has. Nothing is measured or stored.

    Arguments:
        chain: the name of a chain with launch configurations, as "cayley".
        n: of matrices n × n; of norms the numbers of the original.
        dtype: of the original.
        target: as "sm_90" or "gfx942".

    Raises:
        ValueError: the chain has no launch configurations at this size and in this dtype, or the
            GPU is not named like one.
    """
    problem = trials.Problem(chain, n, dtype, target)
    info.require_targets([target])
    row = {"device": target, "dtype": _name(dtype), "chain": chain, "n": n, "batch": 1}
    found = trials.compiled(trials.candidates(problem), problem)
    return Tuning(row | {"path": "kernel", "config": {}}, tuple(found))


def rule_of(plist: ParametrizationList) -> registry.Rule | None:
    """The rule that takes a list's whole chain, whatever was measured before."""
    with configs.trying(None):
        steps = registry.plan(table(), links_of(plist), originals(plist))
    return steps[0][0] if len(steps) == 1 else None


def _row(rule: registry.Rule, plist: ParametrizationList) -> tables.Row:
    chain, x, n = rule.question(links_of(plist), *originals(plist))
    n = max(n, 1)
    row = {"device": configs.device_name(x.device), "dtype": _name(x.dtype), "chain": chain}
    return row | {"n": n, "batch": configs.batch(n, x.numel()), "path": "closed", "config": {}}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(rule: registry.Rule, plist: ParametrizationList, clock: Clock) -> Tuning:
    """Compile, compare and time every way to evaluate a weight, on copies of its list."""
    xs = originals(plist)
    x, row = xs[-1], _row(rule, plist)
    composed = [Trial("composed", {})] if max(x.shape, default=0) <= LARGEST_COMPOSED else []
    ways = [Trial("closed", {}), *composed]
    with configs.trying(None):
        on_kernels = not rule.kernel_declines(links_of(plist), *xs)
    if on_kernels and trials.kernel_file(row["chain"], row["n"], x.dtype):
        target = (info.present() or ("sm_90",))[0]
        problem = trials.Problem(row["chain"], row["n"], x.dtype, target)
        launched = trials.candidates(problem)
        ways = (list(trials.compiled(launched, problem)) if x.is_cuda else launched) + ways
    elif on_kernels:
        ways.insert(0, Trial("kernel", {}))
    weight = trials.Weight(plist, row, reference=ways[-1].path)
    tried = weight.timed(ways, clock)
    right = [trial for trial in tried if not trial.reason]
    if not right:
        return Tuning(row, tuple(tried))
    if both := trials.best_of_phases(tried):
        again = weight.timed([right[0], both], clock)[1]
        tried, right = [*tried, again], [*right, *([] if again.reason else [again])]
    better = [t for t in right if cast(float, t.ratio) <= GAIN and cast(float, t.upper) < 1]
    best = min(better, key=lambda trial: cast(float, trial.ratio), default=right[0])
    row |= {"path": best.path, "config": best.config}
    # Read the original, write the weight; read what comes in and what is saved, write the gradient.
    source, target = torch.empty(2, max(5 * x.numel() // 2, 1), dtype=x.dtype, device=x.device)
    floor = trials.fastest(clock, lambda: target.copy_(source))
    return Tuning(row, tuple(tried), 1e6 * floor / cast(float, best.microseconds))
