"""The device that a result belongs to."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import PEERS
from tritonparam import configs


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What it prints: nothing where this is no repository, or there is no git."""
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root).stdout
    except OSError:
        return ""


def _commit() -> str | None:
    """The commit, marked where anything but the results themselves differs from it."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    head = _git("rev-parse", "--short", "HEAD").strip()
    return head + ("-dirty" if changed else "") if head else None


def _driver() -> str | None:
    """NVIDIA's driver; None where its tool is not there, as on ROCm."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.splitlines()[0].strip() if found.strip() else None


def _device(kind: str) -> str:
    return configs.device_name(torch.device(kind))


def describe(kind: str) -> dict[str, Any]:
    """Device, driver, versions and commit, for the head of a result file."""
    found = {"device": _device(kind)}
    if kind == "cuda":
        found["driver"] = _driver()
    versions = {peer.name: _version(peer.name) for peer in PEERS if peer.name != "torch"}
    return found | {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "peers": {name: version for name, version in versions.items() if version},
        "commit": _commit(),
    }


def folder(kind: str) -> str:
    """The name of the device's folder under ``benchmarks/results/``."""
    return re.sub(r"[^a-z0-9]+", "-", _device(kind).lower()).strip("-")
