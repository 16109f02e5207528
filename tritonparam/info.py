"""What runs here: versions and device, and what every kernel uses when it is compiled."""

from __future__ import annotations

import io
import json
import os
import platform
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import groupby
from multiprocessing import get_context
from typing import Any

import torch

from tritonparam import paths, tables

Row = dict[str, Any]


class BadOption(ValueError):
    """An option is not what it must be; the message names it."""


class Unavailable(RuntimeError):
    """What was asked for cannot be shown here; the message is one sentence."""


def report(
    *, kernels: bool = False, targets: Sequence[str] | None = None, as_json: bool = False
) -> str:
    """The text of ``python -m tritonparam info``.

    Arguments:
        kernels: a table of every shipped kernel configuration, compiled ahead of time, which
            takes a minute or more, instead of versions and device.
        targets: the GPUs to compile for, as "sm_90" or "gfx942"; None is the GPU present, or the
            targets that the project supports.
        as_json: ``{"kernels": [{"name", "target", "regs", "stack", "shared"}, ...]}``, or the
            versions, the device and the state of the user's table as one object.

    Raises:
        BadOption: a target is not named like one, or there are targets without `kernels`.
        Unavailable: triton or rich is not installed, or a kernel does not compile.
    """
    if not kernels:
        if targets:
            raise BadOption("--target needs --kernels: it says what kernels are compiled for.")
        facts = here() | {"table": _table_here()}
        return json.dumps(facts, indent=1) if as_json else _lines(facts)
    rows = compiled(targets)
    return json.dumps({"kernels": rows}, indent=1) if as_json else _table(rows)


def here() -> dict[str, str]:
    """Versions, the device, whether kernels can run on it, and the path override."""
    return {
        "tritonparam": _version("tritonparam"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": _device(),
        "kernels": _kernels_here(),
        "path": f"set to {paths.override()}" if paths.override() else "chosen by the rules",
    }


def compiled(targets: Sequence[str] | None = None) -> list[Row]:
    """Compile every shipped configuration for every target: a row for each, target by target.

    `regs` and `stack` (bytes) are per thread, `shared` (bytes) per program; on gfx942 these are
    vector registers, scratch and LDS. Progress is shown on stderr.
    """
    aot = _compiler()
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError as error:
        raise Unavailable(f"info needs rich ({error}); pip install 'tritonparam[demo]'") from None
    names = list(dict.fromkeys(targets or present() or aot.TARGETS))
    require_targets(names)
    tasks = [(target, i) for target in names for i in range(len(aot.shipped(target)))]
    with processes() as pool:
        found = pool.map(_compile, *zip(*tasks, strict=True))
        screen = Console(stderr=True)
        try:
            rows = list(track(found, "compiling", len(tasks), console=screen))
        except BrokenProcessPool:
            raise Unavailable(
                f"the compiler gave up on {' or '.join(dict(tasks))}; what the project supports "
                f"is {', '.join(aot.TARGETS)}."
            ) from None
    for row in rows:
        if isinstance(row, str):
            raise Unavailable(row)
    return [row for row in rows if not isinstance(row, str)]


def require_targets(names: Iterable[str]) -> None:
    """Raise BadOption where one is not a GPU that is compiled for, before anything is."""
    aot = _compiler()
    for name in names:
        try:
            aot.require_target(name)
        except ValueError as error:
            raise BadOption(f"--{str(error).removeprefix('aot: ')}.") from None


def _compiler() -> Any:
    """``tritonparam.kernels.aot``, or Unavailable raised."""
    if find_spec("triton") is None:
        raise Unavailable("triton is not installed, so that there are no kernels to compile.")
    return paths.kernels("aot")


def compilers() -> Executor:
    """What compiles kernels for a library call: threads, or processes where this one interprets.

    A script without ``if __name__ == "__main__"`` would run again in a fresh process.
    """
    if paths.kernels().INTERPRETED:
        return processes()
    return ThreadPoolExecutor(_processors())


def processes() -> ProcessPoolExecutor:
    """Processes that compile kernels, as many as there are processors.

    Fresh ones: under TRITON_INTERPRET this one cannot compile, and forks of one that has asked the
    GPU for its name are not safe.
    """
    return ProcessPoolExecutor(_processors(), get_context("spawn"), _compile_for_real)


def _processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # before anything here imports triton
    # Line numbers and threads take a share of the time, and change no instruction.
    os.environ["TRITON_DISABLE_LINE_INFO"] = os.environ["MLIR_DISABLE_MULTITHREADING"] = "1"


def _compile(target: str, index: int) -> Row | str:
    """The row of one configuration, or the sentence why there is none."""
    from dataclasses import asdict

    from tritonparam.kernels import aot

    name, kernel, types, options = aot.shipped(target)[index]
    try:
        return asdict(aot.compile_kernel(name, kernel, types, options, target))
    except Exception as error:  # a compiler's, which need not survive the way to another process
        return f"{name} does not compile for {target}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What a compiler says first, and the kind of its error."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), '')}"


def present() -> tuple[str, ...]:
    """The name of the GPU's architecture, as a target."""
    if not torch.cuda.is_available():
        return ()
    if torch.version.hip:
        return (torch.cuda.get_device_properties().gcnArchName.split(":")[0],)
    major, minor = torch.cuda.get_device_capability()
    return (f"sm_{major}{minor}",)


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({', '.join(present())})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _kernels_here() -> str:
    if find_spec("triton") is None:
        return "no: triton is not installed"
    try:
        from tritonparam import kernels
    except Exception as error:  # of an installation that is broken in whatever way
        return f"no: {first_line(error)}; `tritonparam doctor` says more"
    if kernels.INTERPRETED:
        return 'only under use_path("kernel"), in Triton\'s interpreter: TRITON_INTERPRET is set'
    return "yes" if torch.cuda.is_available() else "no: torch sees no GPU"


def _table_here() -> str:
    """What ``tune`` has measured for this machine, and where it is."""
    file = tables.users_file()
    if file is None:
        return f"switched off: {tables.no_table()}"
    if not os.path.exists(file):
        return f"none of these versions in {file.parent}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = tables.read(file)
    if caught:
        return str(caught[0].message)
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} in {file}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _lines(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    lines = (
        textwrap.fill(
            f"{name.ljust(width)}  {text}",
            80,
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in facts.items()
    )
    return "\n".join(lines)


def _table(rows: Iterable[Row]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("name", "target"):
        table.add_column(heading, no_wrap=True)
    for heading in ("registers", "stack", "shared bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for _, of_target in groupby(rows, key=lambda row: row["target"]):
        for row in of_target:
            table.add_row(
                row["name"], row["target"], *(str(row[key]) for key in ("regs", "stack", "shared"))
            )
        table.add_section()
    screen = io.StringIO()
    Console(width=80, file=screen, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines())
