"""The constrained weights of one row: ours, the baseline's and the peers', gated against fp64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import tritonparam as tp
from benchmarks import rows
from benchmarks.cases import BOTH, NORMS, Timed, compiles, least, torchs_bytes, torchs_own
from benchmarks.clock import Clock
from benchmarks.passes import SLOW, Pass, Reader, Samples
from benchmarks.peers import Peer, constraint_error, peers
from tests.cases import composed, error, fused
from tritonparam import configs, info, tables, trials

# Seconds: a baseline or a peer that takes longer is timed once.
ONCE = {"cpu": float("inf"), "cuda": 1.0}
COMPILED_ON_GPU = 20.0  # seconds: what takes longer there is not compiled; SLOW on the CPU
# The largest relative error of a value, or of a constraint, with which a peer is timed, unless it
# is an approximation: torch's own exponentials are off by 5e-6.
EXACT = 1e-4


def _value(reader: Reader) -> Tensor:
    with tp.use_path(reader.path), torch.no_grad():
        return reader.read()[0]


class Weights:
    """The constrained weights of one row: ours, and those of the baseline.

    Attributes:
        none: why there is no baseline, or no compiled one, by contender.
        once: times of composed and compiled where they are too slow to be timed again, known after
            `passes`.
    """

    def __init__(self, timed: Timed, clock: Clock) -> None:
        torch.manual_seed(0)
        self.timed, self.clock = timed, clock
        case, norm = timed.case, NORMS.get(timed.name, 1.0)
        self.originals = [
            case.original(shape, norm, torch.float32).to(clock.device) for shape in timed.shapes
        ]
        self.gs = [torch.randn(shape, device=clock.device) for shape in timed.shapes]
        self.modules = [case.module(x) for x in self.originals]
        make = torchs_own(case)
        self.none: dict[str, str] = {}
        if make and (no_room := self._no_room()):
            self.none["composed"] = no_room
        self.once: dict[str, Samples] = {}
        self.theirs: list[nn.Module] = []
        if not self.none:
            self.theirs = [make(x) if make else case.module(x) for x in self.originals]

    def _no_room(self) -> str:
        need = sum(torchs_bytes(self.timed.name, shape) for shape in self.timed.shapes)
        free = self.clock.free_bytes()
        if need <= free:
            return ""
        return f"none: torch's n × n matrices take {need >> 30} GB of {free >> 30} GB"

    def paths(self) -> list[str]:
        """The fused paths that these weights have on this device."""
        if self.clock.kind == "cpu":
            return ["closed"]
        with tp.use_path("kernel"):
            rows = [tp.explain(module)[0] for module in self.modules]
        return ["closed", "kernel"] if all(row.path == "kernel" for row in rows) else ["closed"]

    def gate(self) -> dict[str, tuple[float, float]]:
        """The largest errors of value and gradient by contender.

        Fails where a fused one is not as good as torch.
        """
        found: dict[str, tuple[float, float]] = {}
        distinct = {g.shape: (m, g) for m, g in zip(self.modules, self.gs, strict=True)}
        for module, g in distinct.values():
            for name, errors in gate(module, g, self.paths()).items():
                before = found.get(name, (0.0, 0.0))
                found[name] = (max(before[0], errors[0]), max(before[1], errors[1]))
        return found

    def one_launch(self) -> tables.Row | None:
        """What has the kernels of one weight carry out their rounds in one launch, if any have.

        Their tiles are those of the default, which launches every product.
        """
        x, chain = self.originals[0], self.timed.name
        n, target = x.size(-1), info.present() or ("sm_90",)
        if "kernel" not in self.paths() or not trials.kernel_file(chain, n, x.dtype):
            return None
        config: dict[str, dict[str, Any]] = {}
        for trial in trials.candidates(trials.Problem(chain, n, x.dtype, target[0])):
            for phase, numbers in trial.config.items():
                if "programs" in numbers and "block" not in numbers:
                    config.setdefault(phase, numbers)
        row = {"device": configs.device_name(x.device), "dtype": "float32", "chain": chain, "n": n}
        row |= {"batch": configs.batch(n, x.numel()), "path": "kernel", "config": config}
        return row if config else None

    def gate_of_one_launch(self, row: tables.Row) -> tuple[float, float]:
        """The errors of `gate`, of the kernel as a row says."""
        with configs.trying(row):
            return gate(self.modules[0], self.gs[0], ["kernel"])["kernel"]

    def train(self) -> None:
        """Put all into training mode, as what is timed."""
        for module in (*self.modules, *self.theirs):
            module.train()

    def passes(self) -> dict[str, Pass]:
        """Forward and backward over these weights, by contender; each has run."""
        readers: dict[str, Reader] = {}
        samples = self._baseline()
        if samples is not None:
            readers["composed"] = theirs = Reader.of("composed", self.theirs)
            if samples[BOTH].seconds > ONCE[self.clock.kind]:
                self.once["composed"] = samples
            compiled = all(compiles(self.timed.name, shape) for shape in self.timed.shapes)
            longest = SLOW if self.clock.kind == "cpu" else COMPILED_ON_GPU
            if compiled and samples[BOTH].seconds < longest:
                read = torch.compile(theirs.read, dynamic=False)
                readers["compiled"] = theirs._replace(read=read)
        readers |= {path: Reader.of(path, self.modules) for path in self.paths()}
        found = {name: Pass(reader, self.gs) for name, reader in readers.items()}
        for name in [name for name in found if name != "composed"]:
            try:
                found[name].run()
                if name == "compiled" and self.once:
                    self.once[name] = found[name].samples(self.clock)
            except Exception as error:  # a compiler's can be of any kind
                if name != "compiled":
                    raise
                self.none[name] = rows.none_for(error)
                del found[name]
        return found

    def peers(self) -> list[Peer]:
        """Those that do the same for one weight, if torch has the room for it."""
        if len(self.originals) > 1 or "composed" in self.none:
            return []
        return peers(self.timed.name, self.timed.shapes[0])

    def gate_of(self, peer: Peer) -> tuple[Reader, dict[str, float]]:
        """What reads a peer's weight; how far that is from the constraint, and from the chain."""
        torch.manual_seed(0)
        reader = Reader.of("composed", [peer.make(self.timed.case, self.originals[0]).train()])
        return reader, self.constraint(reader) | self._distance(reader, peer)

    def constraint(self, reader: Reader) -> dict[str, float]:
        """How far one weight is from its constraint."""
        if len(self.originals) > 1:
            return {}
        found = constraint_error(self.timed.name, _value(reader))
        return {} if found is None else {"constraint_error": found}

    def _distance(self, reader: Reader, peer: Peer) -> dict[str, float]:
        if self.timed.name in peer.other_map:
            return {}
        exact = deepcopy(self.modules[0]).double()
        y64 = _value(Reader.of("composed", [exact]))
        return {"value_error": error(_value(reader), y64)}

    def _baseline(self) -> Samples | None:
        """Its second run, or None where there is no baseline, or too little memory for it."""
        if "composed" in self.none:
            return None
        theirs = Pass(Reader.of("composed", self.theirs), self.gs)
        try:
            theirs.run()
            return theirs.samples(self.clock)
        except torch.OutOfMemoryError as error:
            self.theirs, self.none["composed"] = [], rows.none_for(error)
            return None

    def floor(self, phase: str) -> float:
        """Seconds of the bytes and operations that all of them need in a phase."""
        needs = [least(self.timed.name, shape, phase) for shape in self.timed.shapes]
        n_bytes, operations = (sum(column) for column in zip(*needs, strict=True))
        return self.clock.floor(n_bytes, operations, self.timed.shapes[0][-1])


def gate(module: nn.Module, g: Tensor, paths: list[str]) -> dict[str, tuple[float, float]]:
    """Errors of value and gradient, of torch's links and of ours, by path."""
    # Matrix by matrix in fp64: batched LU on the CPU cannot be trusted there (pytorch #142815).
    module = deepcopy(module).eval()
    y64, dw64 = composed(module, g)
    y32, dw32 = composed(module, g, torch.float32)
    found = {"composed": (error(y32, y64), error(dw32, dw64))}
    for path in paths:
        y, dw = fused(module, g, path)
        found[path] = (error(y, y64), error(dw, dw64))
        for mine, theirs in zip(found[path], found["composed"], strict=True):
            assert mine <= 3 * theirs + 5e-7, f"{path} is off by {mine:.1e}, torch by {theirs:.1e}"
    return found
