"""Self-checks of the package on the machine at hand, in plain words and within a minute."""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonparam import info, paths, registry, samples, surroundings, tuner
from tritonparam.fuse import links_of, originals, parametrized_tensors
from tritonparam.reading import Reading
from tritonparam.surroundings import FAILED, OK, SKIPPED, Finding, place

Check = Callable[[], Finding]
# Relative, in fp32: a hundred times what any chain is off by at these sizes.
TOLERANCE = 1e-4
REPORT = "report it with the output of `python -m tritonparam doctor --json`"


@dataclass(frozen=True)
class Result:
    """One check: its name, "ok", "skipped" or "failed", and what was found and what to do."""

    name: str
    status: str
    text: str

    def __str__(self) -> str:  # noqa: D105
        label = f"{self.status:8}{self.name:15}"
        return textwrap.fill(
            label + self.text,
            80,
            subsequent_indent=" " * len(label),
            break_on_hyphens=False,
            break_long_words=False,
        )


def checks() -> list[tuple[str, Check]]:
    """All of them, in the order in which one explains the next."""
    return [
        ("versions", surroundings.versions),
        ("install", surroundings.install),
        ("device", surroundings.device),
        ("environment", surroundings.environment),
        ("table", surroundings.cache),
        ("triton", triton),
        *((name, partial(chain, name)) for name in samples.NAMES),
        ("training step", training_step),
        ("no waiting", no_waiting),
        ("CUDA graphs", cuda_graphs),
    ]


def run(todo: Iterable[tuple[str, Check]]) -> Iterator[Result]:
    """The results of checks; what one raises is a failure of it and of no other."""
    for name, check in todo:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say, a check finds
            try:
                yield Result(name, *check())
            except Exception as error:
                yield Result(name, FAILED, f"{info.first_line(error)}; {REPORT}")


def summary(results: Sequence[Result]) -> str:
    """The last line: what is wrong."""
    failed = [result.name for result in results if result.status == FAILED]
    if not failed:
        return "Nothing is wrong."
    return f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}."


def as_json(results: Sequence[Result]) -> str:
    """``{"failed": int, "checks": [{"name", "status", "text"}, ...]}``."""
    failed = sum(result.status == FAILED for result in results)
    return json.dumps({"failed": failed, "checks": [asdict(r) for r in results]}, indent=1)


def triton() -> Finding:
    """Triton compiles a kernel, and runs it where there is something to run it on."""
    remain = "closed forms and torch's own chains remain"
    spec = find_spec("triton")
    if spec is None:
        return SKIPPED, f"triton is not installed: {remain}"
    try:
        interpreted = paths.kernels().INTERPRETED
    except Exception as error:  # of an installation that is broken in whatever way
        return FAILED, (
            f"triton, from {spec.origin}, cannot be imported ({info.first_line(error)}): if that "
            f"file is not Triton's, rename it, else install triton again. Until then {remain}"
        )
    if not interpreted and not torch.cuda.is_available():
        from tritonparam.kernels import aot

        kernel = next(row for row in aot.shipped("sm_90") if row[0].startswith("cayley_fwd"))
        try:
            aot.compile_kernel(*kernel, "sm_90")
        except Exception as error:  # a compiler's, of any kind
            return FAILED, (
                f"it does not compile {kernel[0]} for sm_90: {info.first_line(error)}; install "
                f"triton again. Until then {remain}"
            )
        return OK, f"it compiles for sm_90; without a GPU nothing runs, so {remain}"
    wrong, _ = _compared("cayley", "kernel")
    if wrong:
        return FAILED, f"a kernel ran wrong: {wrong}; until that is mended {remain}"
    where = "in its interpreter (TRITON_INTERPRET is set)" if interpreted else "on the GPU"
    return OK, f"it compiles and runs a kernel {where}"


def chain(name: str) -> Finding:
    """Value and gradient of a chain are those of torch's own in fp64, on every fused path."""
    said = []
    for path in ("kernel", "closed"):
        if path == "kernel" and _kernel_declines(_sample(name)):
            continue
        wrong, error = _compared(name, path)
        if wrong:
            instead = "closed" if path == "kernel" else "composed"
            way = f"`with tritonparam.use_path({instead!r}):` avoids it"
            return FAILED, f"{path}: {wrong}; {way}, {REPORT}"
        said.append(f"{path} {error:.0e}")
    return OK, "largest relative error " + ", ".join(said)


def _sample(name: str) -> nn.Module:
    return samples.weight(name, samples.shape(name, 8, 24), torch.float32, place())


def _reading(module: nn.Module) -> Reading:
    ((_, _, plist),) = parametrized_tensors(module)
    return Reading(plist, "composed")


def _kernel_declines(module: nn.Module) -> str:
    ((_, _, plist),) = parametrized_tensors(module)
    try:
        paths.kernels()
    except Exception as error:  # the check of triton says what to do
        return info.first_line(error)
    with paths.use_path("kernel"):
        rule = tuner.rule_of(plist)
        if rule is None:
            return registry.NO_RULE
        return rule.kernel_declines(links_of(plist), *originals(plist))


def _compared(name: str, path: str) -> tuple[str, float]:
    """How a chain misbehaves on a path, or the empty string, and its largest error."""
    reading = _reading(_sample(name))
    try:
        with paths.use_path(path):
            errors = reading.errors()
    except Exception as error:
        return info.first_line(error), math.nan
    wrong = [
        f"the {what} of {name} is off by {e:.0e}"
        for what, e in errors.items()
        if not e <= TOLERANCE
    ]
    return ", ".join(wrong), max(errors.values())


def training_step() -> Finding:
    """Steps of a fused model change its parameters as those of the composed one do in fp64."""
    if path := paths.override():
        return SKIPPED, f"the path is set to {path}"
    x = torch.linspace(-1, 1, 48, device=place()).view(6, 8)
    before = paths.stats()
    fused = _trained(_Layers(), x)
    taken = {path: n - before[path] for path, n in paths.stats().items() if n > before[path]}
    with paths.use_path("composed"):
        composed = _trained(_Layers().double(), x.double())
    apart = [(p.double() - q).abs().max() for p, q in zip(fused, composed, strict=True)]
    off = float(torch.stack(apart).max())
    if not off <= TOLERANCE:
        return FAILED, f"after three steps parameters are off by {off:.0e}; {REPORT}"
    on = " and ".join(taken)
    if "composed" in taken:
        return OK, f"three steps, off by {off:.0e}; some weights were composed, as `tune` measured"
    return OK, f"three steps on the path {on}, parameters off by {off:.0e}"


class _Layers(nn.Module):
    """Three weights in a row, the same at every call."""

    def __init__(self) -> None:
        super().__init__()
        names = ("cayley", "spectral_norm", "weight_norm")
        self.layers = nn.ModuleList(
            samples.weight(name, (8, 8), torch.float32, place()) for name in names
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = (x @ cast(Tensor, layer.weight).mT).tanh()
        return x


def _trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def no_waiting() -> Finding:
    """No fused chain makes the host wait for the GPU."""
    if not torch.cuda.is_available():
        return SKIPPED, "there is no GPU to wait for"
    waiting = []
    for name in samples.NAMES:
        step, _ = _step(name)
        step()  # compiles
        if waits(step):
            waiting.append(name)
    if waiting:
        return FAILED, f"{', '.join(waiting)} wait for the GPU, and slow training down; {REPORT}"
    return OK, "no fused chain waits for the GPU"


def waits(step: Callable[[], object]) -> bool:
    """Whether a step makes the host wait for the GPU, so that no graph can hold it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def cuda_graphs() -> Finding:
    """Every fused chain can be captured, and its replay gives what it gives itself."""
    if not torch.cuda.is_available():
        return SKIPPED, "there is no GPU to capture on"
    wrong = []
    for name in samples.NAMES:
        step, inputs = _step(name)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        with torch.no_grad():
            for x in inputs:
                x.mul_(-0.5)
        graph.replay()
        pairs = zip(found, step(), strict=True)
        if not all(torch.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE) for x, y in pairs):
            wrong.append(name)
    if wrong:
        return FAILED, (
            f"replays of {', '.join(wrong)} give something else: read those weights outside of "
            f"graphs, and {REPORT}"
        )
    return OK, "every fused chain was captured and replayed"


def _step(name: str) -> tuple[Callable[[], list[Tensor]], tuple[Tensor, ...]]:
    """Forward and backward of a chain, and the originals that they read.

    In eval mode, so that each call means the same.
    """
    module: Any = _sample(name).eval()
    plist = module.parametrizations.weight
    return partial(_reading(module).step, plist), originals(plist)
