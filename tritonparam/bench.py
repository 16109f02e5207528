"""Times of a weight on this machine: torch's chain against the fused paths that it has here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tritonparam import configs, info, paths, registry, samples, trials, tuner, turns
from tritonparam.fuse import fuse, links_of, originals, parametrized_tensors
from tritonparam.reading import Reading, too_far
from tritonparam.report import BadOption, build, floating, where
from tritonparam.trials import Clock

PHASES = ("forward", "backward", "both")
WARM_UP, LEAST_ROUNDS = 2, 3


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median, the 20th and the 80th percentile."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:  # noqa: D105
        return f"{_short(self.median, 3)} {_short(self.p20, 2)}–{_short(self.p80, 2)}"


def _short(x: float, digits: int) -> str:
    """A number with so many digits, without an exponent."""
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(x)))}f}" if x > 0 else "0"


@dataclass(frozen=True)
class Way:
    """One way to evaluate a weight.

    Attributes:
        name: "composed", "compiled" (composed under ``torch.compile``), "closed" or "kernel".
        times: of forward, backward and both together; empty where it was not timed.
        gain: how many times as long the composed chain takes for both, the median over rounds.
        error: the largest relative error of value and gradient against fp64.
        reason: why it was not timed, or the empty string.
    """

    name: str
    times: dict[str, Times]
    gain: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Timing:
    """A weight and the ways to evaluate it, in the order in which they took turns."""

    name: str
    chain: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    rounds: int
    ways: tuple[Way, ...]

    def __str__(self) -> str:  # noqa: D105
        size = "×".join(map(str, self.shape))
        title = f"{self.chain}, {size}, {self.dtype}, {self.device}, {self.rounds} rounds"
        cells: list[tuple[str, ...]] = [("ms", *PHASES, "gain", "error")]
        for way in self.ways:
            cells.append(
                (
                    way.name,
                    *(str(way.times.get(phase, "–")) for phase in PHASES),
                    "" if way.gain is None else f"{way.gain:.2f}×",
                    "" if way.error is None else f"{way.error:.0e}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [title if self.name == "weight" else f"{self.name}: {title}"]
        for (name, *numbers), reason in zip(
            cells, ["", *(w.reason for w in self.ways)], strict=True
        ):
            right = [c.rjust(w) for c, w in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
            if reason:
                lines.append(f"    {reason}")
        return "\n".join(lines)


def run(
    target: str | None,
    *,
    chains: Sequence[str] = (),
    sizes: Sequence[int] = (),
    rows: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    device: str | None = None,
    compiled: bool = False,
    seconds: float = 2.0,
    clock: Clock | None = None,
) -> Iterator[Timing]:
    """Time the weights of the model that "module:function" makes, or chains by name.

    Every kind of weight, of one chain, shape and dtype, is timed once, on copies.

    Arguments:
        target: the model, or None for every one of `chains` at every one of `sizes`.
        chains: of ``samples.NAMES``.
        sizes: n of n × n, and the columns of the other chains.
        rows: of tall chains and of the norms'; None is eight times the columns.
        batch: how many matrices.
        dtype: of the originals, with `chains`.
        device: where to time; None is "cuda" where there is one, else "cpu".
        compiled: time the composed chain under ``torch.compile`` too.
        seconds: about how long a weight is timed, beyond the least number of rounds.
        clock: called with a step; runs it and returns its seconds. None is the device's.

    Raises:
        BadOption: an option is not what it must be, or does not go with another.
    """
    number = floating(dtype)
    if (target is None) == (not chains):
        raise BadOption("bench takes either a model as module:callable, or --chain and --n.")
    if chains and (not sizes or min(*sizes, batch, 1 if rows is None else rows) < 1):
        raise BadOption("--chain needs --n, and --n, --rows and --batch must be at least 1.")
    if target is not None and (sizes or rows is not None or batch != 1 or dtype != "float32"):
        raise BadOption("--n, --rows, --batch and --dtype go with --chain; a model has its own.")
    if not 0 <= seconds < math.inf:
        raise BadOption(f"--seconds must be positive and finite, got {seconds!r}.")
    device = where(device)
    model = None if target is None else build(target)
    try:
        if model is not None:
            models = [fuse(model).to(device)]
        else:
            shapes = [(c, samples.shape(c, n, rows or 8 * n, batch)) for c in chains for n in sizes]
            models = [samples.weight(c, shape, number, device) for c, shape in shapes]
    except (ValueError, RuntimeError) as error:
        raise BadOption(str(error)) from error
    weights = _distinct(models)
    if not weights:
        raise BadOption(
            "the model has no weight whose whole chain a rule takes; "
            "`python -m tritonparam explain` says why not."
        )
    return (
        _timed(name, rule, plist, compiled, seconds, clock or trials.clock_of(torch.device(device)))
        for name, rule, plist in weights
    )


def _distinct(
    models: Iterable[nn.Module],
) -> list[tuple[str, registry.Rule, ParametrizationList]]:
    """One weight of each kind: its name, the rule of its whole chain, its list."""
    found: dict[object, tuple[str, registry.Rule, ParametrizationList]] = {}
    for model in models:
        for _, name, plist in parametrized_tensors(model):
            if rule := tuner.rule_of(plist):
                xs, links = originals(plist), links_of(plist)
                kind = rule.question(links, *xs)[0], tuple((x.shape, x.dtype) for x in xs)
                found.setdefault(kind, (name, rule, plist))
    return list(found.values())


class _Contender:
    """A copy of a list that is read and differentiated on one path, as training does it."""

    def __init__(self, name: str, path: str, reading: Reading) -> None:
        self.name, self._path, self._reading = name, path, reading
        self._plist = reading.copy().requires_grad_()
        self._xs = originals(self._plist)
        plist = self._plist
        self._read: Callable[[], Tensor] = lambda: plist()
        if name == "compiled":
            self._read = torch.compile(self._read, dynamic=False)

    def forward(self) -> Tensor:
        return self._read()

    def both(self) -> list[Tensor]:
        y = self._read()
        return [y.detach(), *self._reading.backward(self._xs, y)]

    def checked(self) -> tuple[float | None, str]:
        """The largest error of the first step, or why it is not timed."""
        try:
            with paths.use_path(self._path), torch.enable_grad(), torch.random.fork_rng():
                errors = self._reading.compared(self.both())
        except Exception as error:  # of a path, or a compiler, that does not take this weight
            return None, info.first_line(error)
        wrong = too_far(errors, self._xs[0].dtype)
        return None if wrong else max(errors.values()), wrong

    def turn(self, clock: Clock) -> tuple[float, float, float]:
        """The seconds of forward, backward and both."""
        with paths.use_path(self._path), torch.enable_grad():
            forward = clock(self.forward)
            y = self._read()
            backward = clock(lambda: self._reading.backward(self._xs, y))
            return forward, backward, clock(self.both)


def _timed(
    name: str,
    rule: registry.Rule,
    plist: ParametrizationList,
    compiled: bool,
    seconds: float,
    clock: Clock,
) -> Timing:
    xs, links = originals(plist), links_of(plist)
    large = max(xs[-1].shape, default=0) > tuner.LARGEST_COMPOSED and rule.name not in samples.LAYER
    reading = Reading(plist, "closed" if large else "composed")
    names = ["composed", *(["compiled"] if compiled else []), "closed"]
    with paths.use_path("kernel"):
        kernel_declines = rule.kernel_declines(links, *xs)
    if not (kernel_declines or paths.device_declines(xs[-1])):
        names.append("kernel")
    ways: dict[str, Way] = {}
    timed: dict[str, _Contender] = {}
    for way in names:
        path = "composed" if way == "compiled" else way
        if large and path == "composed":
            why = f"torch's own chain is not waited for beyond {tuner.LARGEST_COMPOSED} rows"
            ways[way] = Way(way, {}, reason=why)
            continue
        contender = _Contender(way, path, reading)
        error, reason = contender.checked()
        ways[way] = Way(way, {}, error=error, reason=reason)
        if not reason:
            timed[way] = contender
    timers = [partial(contender.turn, clock) for contender in timed.values()]
    rounds = turns.take(timers, warm_up=WARM_UP, least=LEAST_ROUNDS, seconds=seconds)
    columns = {way: list(zip(*said, strict=True)) for way, said in zip(timed, rounds, strict=True)}
    for way, phases in columns.items():
        gain = None
        if way != "composed" and "composed" in columns:
            gain = statistics.median(turns.ratios(columns["composed"][-1], phases[-1]))
        times = zip(PHASES, map(_times, phases), strict=True)
        ways[way] = Way(way, dict(times), gain, ways[way].error)
    chain, x, _ = rule.question(links, *xs)
    dtype = str(x.dtype).removeprefix("torch.")
    return Timing(
        name,
        chain,
        tuple(x.shape),
        dtype,
        "cpu" if x.device.type == "cpu" else configs.device_name(x.device),
        len(rounds[0]) if rounds else 0,
        tuple(ways.values()),
    )


def _times(seconds: Sequence[float]) -> Times:
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(*(1e3 * s for s in (statistics.median(seconds), p20, p80)))


def as_json(found: Iterable[Timing]) -> str:
    """``{"machine": {...}, "weights": [...]}``: what ``info`` says, and the fields of each."""
    weights = [asdict(timing) for timing in found]
    return json.dumps({"machine": info.here(), "weights": weights}, indent=1)
