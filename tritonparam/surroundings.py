"""What surrounds the package on a machine and can be wrong: versions, copies, device, variables,
the user's table. Each check returns a status and a sentence."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from tritonparam import configs, info, paths, tables

Finding = tuple[str, str]
OK, SKIPPED, FAILED = ("ok", "skipped", "failed")
OLDEST = {"python": (3, 10), "torch": (2, 11), "triton": (3, 6)}
HERE = Path(__file__).resolve().parent


def versions() -> Finding:
    """Python, torch and triton are not older than what the package is tested with."""
    found = {name: info.here()[name] for name in OLDEST}
    for name, oldest in OLDEST.items():
        digits = re.match(r"(\d+)\.(\d+)", found[name])
        if digits and (int(digits[1]), int(digits[2])) < oldest:
            wanted = ".".join(map(str, oldest))
            way = "" if name == "python" else f": pip install '{name}>={wanted}'"
            return FAILED, f"{name} {found[name]} is older than {wanted}, which is needed{way}"
    return OK, ", ".join(f"{name} {number}" for name, number in found.items())


def install() -> Finding:
    """The package has its kernels, and there is no other copy of it that could be meant."""
    if find_spec("tritonparam.kernels") is None:
        return FAILED, f"{HERE} has no kernels: it is a source folder; pip install -e {HERE.parent}"
    others = [other for other in dict.fromkeys(_copies()) if other != HERE]
    if others:
        return FAILED, (
            f"tritonparam is imported from {HERE}, and another copy is in "
            f"{' and '.join(map(str, others))}: remove one, or start Python in another folder"
        )
    return OK, f"imported from {HERE}"


def _copies() -> Iterable[Path]:
    """The folders of the package that the path or an installation names."""
    for entry in sys.path:
        folder = Path(entry or ".") / "tritonparam"
        if (folder / "__init__.py").is_file():
            yield folder.resolve()
    for found in distributions(name="tritonparam"):
        source = json.loads(found.read_text("direct_url.json") or "{}")
        if source.get("dir_info", {}).get("editable"):
            folder = Path(unquote(urlparse(source["url"]).path)) / "tritonparam"
        else:
            folder = Path(str(found.locate_file("tritonparam")))
        if (folder / "__init__.py").is_file():
            yield folder.resolve()


def device() -> Finding:
    """torch sees the GPU, where the machine has one."""
    name = info.here()["device"]
    if torch.cuda.is_available():
        return OK, name
    cards = [f for f in ("/dev/nvidia0", "/dev/kfd") if Path(f).exists()]
    if not cards:
        return OK, f"{name}; no GPU, so that weights take closed forms"
    hidden = [v for v in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if v in os.environ]
    if hidden:
        return OK, f"{name}; {hidden[0]} hides the GPU, so that weights take closed forms"
    built = torch.version.cuda or torch.version.hip
    why = (
        f"the driver may be too old for its CUDA or ROCm {built}: update it, or install a torch "
        "for an older one"
        if built
        else "it is a build for the CPU: install one for CUDA or ROCm, see pytorch.org"
    )
    return FAILED, f"there is a GPU ({cards[0]}) that torch {torch.__version__} does not see; {why}"


def environment() -> Finding:
    """No variable makes the package do something else than a user expects."""
    said = []
    if path := os.environ.get("TRITONPARAM_PATH"):
        if path == "kernel" and paths.device_declines(torch.empty(0, device=place())):
            return FAILED, (
                "TRITONPARAM_PATH=kernel, and no kernel can run here, so that reading a fused "
                "weight is an error: unset it"
            )
        fusing = "fusing is off" if path == "composed" else "every fused weight takes that path"
        said.append(f"TRITONPARAM_PATH={path}: {fusing} until it is unset")
    if interpret := os.environ.get("TRITON_INTERPRET"):
        text = f"TRITON_INTERPRET={interpret}: kernels run in Triton's interpreter"
        if torch.cuda.is_available() and interpret.lower() in ("1", "true", "on", "yes", "y"):
            return FAILED, f"{text}, on a machine with a GPU, and take ages there: unset it"
        said.append(text)
    if (folder := os.environ.get("TRITONPARAM_CACHE_DIR")) is not None:
        use = f"the user's table is in {folder}" if folder else "the user's table is switched off"
        said.append(f"TRITONPARAM_CACHE_DIR={folder}: {use}")
    return OK, "; ".join(said) or "no variable changes what is done"


def place() -> str:
    """Where checks compute: "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cache() -> Finding:
    """The user's table can be read and written, and is of this machine and these versions."""
    file = tables.users_file()
    if file is None:
        return SKIPPED, f"{tables.no_table()}, so that there is no table of the user's"
    folder = next(f for f in (file.parent, *file.parent.parents) if os.path.exists(f))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return FAILED, (
            f"{file.parent} cannot be written ({error.strerror}), so that `tune` would fail: "
            "change its permissions, or set TRITONPARAM_CACHE_DIR to a folder of yours"
        )
    if not os.path.exists(file):
        others = len(list(file.parent.glob("tuned-*.json")))
        text = f"no table yet in {file.parent}; `python -m tritonparam tune` makes one"
        return OK, text + (f" ({others} of other versions are not used)" if others else "")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = tables.read(file).values()
    if caught:
        return FAILED, f"{caught[0].message} Delete the file, and run `tune` again"
    here = {configs.device_name(torch.device(kind)) for kind in ("cpu", place())}
    foreign = sorted({row["device"] for row in rows} - here)
    text = f"{len(rows)} rows in {file}"
    return OK, text + (f"; those of {', '.join(foreign)} wait for that device" if foreign else "")
