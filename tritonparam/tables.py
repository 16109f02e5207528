"""The tables of measured paths and launch configurations: their format, reading and storing.

There are two: the shipped ``tuned_configs.json``, and the user's own, which ``tune`` writes and
which has the last word. A table has a row for each device, dtype, chain, size and batch::

    {"format": 1, "rows": [
      {"device": "NVIDIA H100 80GB HBM3", "dtype": "float32", "chain": "cayley", "n": 64,
       "batch": 1024, "path": "kernel",
       "config": {"fwd": {"num_warps": 2}, "bwd": {"block_k": 32}}}
    ]}

``device`` is ``torch.cuda.get_device_name()``, or a CPU's model and threads; ``dtype`` is that of
the originals. A row speaks for the sizes in (2ᵏ⁻¹, 2ᵏ] that its ``n`` lies in, as kernels do with
their power-of-two tiles, and likewise for batches. ``config`` replaces numbers of the heuristic
beside the kernel, by phase; a ``path`` of "closed" or "composed" says that the kernel, or
everything fused, was measured slower. The user's table says too with which versions and which
source of this package it was measured, and speaks for those alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

PATHS = ("kernel", "closed", "composed")
FORMAT = 1
HERE = Path(__file__).parent
SHIPPED = HERE / "tuned_configs.json"


@dataclass(frozen=True)
class Choice:
    """What a row says: the path, and the launch numbers of its kernels by phase."""

    path: str
    config: dict[str, dict[str, Any]]


Row = dict[str, Any]
Key = tuple[str, torch.dtype, str, int, int]
_WANTED = {
    "device": str,
    "dtype": str,
    "chain": str,
    "n": int,
    "batch": int,
    "path": str,
    "config": dict,
}
_DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def bucket(n: int) -> int:
    """The power of two at or above n, which stands for the sizes that are looked up alike."""
    return 1 << max(n - 1, 0).bit_length()


def key(row: Row) -> Key:
    """What a row speaks for; raises ValueError where it is not a row."""
    if not isinstance(row, dict) or set(row) != set(_WANTED):
        raise ValueError(f"a row must have {', '.join(_WANTED)}, got {row}")
    for name, kind in _WANTED.items():
        if type(row[name]) is not kind:
            raise ValueError(f"{name} must be a JSON {kind.__name__}, got {row}")
    dtype = _DTYPES.get(row["dtype"])
    if dtype is None or row["path"] not in PATHS or min(row["n"], row["batch"]) < 1:
        raise ValueError(f"no such dtype, path or size: {row}")
    phases = row["config"].items()
    if any(phase not in ("fwd", "bwd") or type(numbers) is not dict for phase, numbers in phases):
        raise ValueError(f"config must hold objects under fwd and bwd, got {row}")
    if row["config"] and row["path"] != "kernel":
        raise ValueError(f"only a kernel has a config, got {row}")
    return row["device"], dtype, row["chain"], bucket(row["n"]), bucket(row["batch"])


def parse(text: str, made_with: dict[str, str] | None = None) -> dict[Key, Row]:
    """The rows of a table by what they speak for; raises ValueError where it is not one.

    `made_with` are the versions that it must have been measured with, if any.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it must be an object with format {FORMAT}")
    if content.get("made_with") != made_with:
        raise ValueError(f"it was made with {content.get('made_with')}, this is {made_with}")
    rows = content.get("rows")
    if not isinstance(rows, list):
        raise ValueError("rows must be a list")
    table: dict[Key, Row] = {}
    for row in rows:
        if key(row) in table:
            raise ValueError(f"two rows speak for the same sizes: {row}")
        table[key(row)] = row
    return table


def versions() -> dict[str, str]:
    """Of everything whose change can change what is fastest, beside the device."""
    found: dict[str, str] = {"torch": str(torch.__version__)}
    for package in ("tritonparam", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found | {"source": _source()}


@cache
def _source() -> str:
    """A digest of the files that a weight can be computed by.

    An installation that is edited keeps its version, and what was fastest need not be any longer.
    """
    kernels = find_spec("tritonparam.kernels")
    folders = [
        HERE,
        HERE / "ops",
        *map(Path, (kernels and kernels.submodule_search_locations) or ()),
    ]
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def users_file() -> Path | None:
    """The user's own table, one for each set of versions; None where ``no_table`` says why.

    It lies in ``TRITONPARAM_CACHE_DIR``, which switches it off where it is empty, or in
    ``tritonparam`` in the user's folder for caches.
    """
    folder = os.environ.get("TRITONPARAM_CACHE_DIR")
    if folder == "":
        return None
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tritonparam")
    folder = os.path.expanduser(folder)
    if folder.startswith("~"):  # no HOME, and no such user: it would be a folder of that name
        return None
    return Path(folder) / f"tuned-{'-'.join(k + v for k, v in sorted(versions().items()))}.json"


def no_table() -> str:
    """Why the user can have no table, where ``users_file`` is None."""
    empty = os.environ.get("TRITONPARAM_CACHE_DIR") == ""
    return "TRITONPARAM_CACHE_DIR is empty" if empty else "no home is known"


def read(file: Path) -> dict[Key, Row]:
    """The table in a file; a warning, and an empty one, where it is not one.

    That the user has none, or a home that is somebody else's, is no reason to warn.
    """
    if file != SHIPPED and not os.path.exists(file):
        return {}
    try:
        return parse(file.read_text(), None if file == SHIPPED else versions())
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{file} is not used: {error}; what it spoke for takes the default.", stacklevel=2
        )
        return {}


def store(rows: Iterable[Row], file: Path) -> None:
    """Put rows into a file, in the place of those that speak for the same.

    What is there is read under a lock and replaced as a whole, so that several processes may
    store, and one that is killed leaves a file as it was before.
    """
    new = {key(row): row for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        table = (read(file) if file.exists() else {}) | new
        content: Row = {"format": FORMAT}
        if file != SHIPPED:
            content["made_with"] = versions()
        body = json.dumps(content)[:-1] + ', "rows": ['
        lines = sorted(json.dumps(row, ensure_ascii=False) for row in table.values())
        text = body + ",".join("\n  " + line for line in lines) + "\n]}\n"
        # Not of tempfile, whose files others cannot read: the package's own is for all users.
        new_file = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            with new_file.open("w") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(new_file, file)
        except BaseException:
            new_file.unlink(missing_ok=True)
            raise


def require_writable(file: Path) -> None:
    """Raise ValueError where a table cannot be stored, before time is spent on what it is for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is there, who reads it has warned
            store([], file)
    except OSError as error:
        raise ValueError(
            f"tune: the table {file} cannot be written ({error.strerror}); change its permissions, "
            "or set TRITONPARAM_CACHE_DIR to a folder of yours."
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; where the system has none, as Windows, there is none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
