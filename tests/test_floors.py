"""The house: imports go down, and the package needs neither triton nor a GPU to be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Every file's floor; a file imports from lower floors only. Files of one floor that build on each
# other are told apart by the fraction.
FLOORS = {
    "kernels": 0,
    "kernels.launch": 0.1,
    "kernels.slices": 0.1,
    "kernels.grouped": 0.15,
    "kernels.tile": 0.1,
    "kernels.tile_grid": 0.1,
    "kernels.scratch": 0.1,
    "kernels.gauss_jordan": 0.15,
    "kernels.even_odd": 0.15,
    "kernels.gemm": 0.2,
    "kernels.cayley": 0.2,
    "kernels.paterson_stockmeyer": 0.2,
    "kernels.expm": 0.25,
    "kernels.mirror": 0.25,
    "kernels.rounds": 0.25,
    "kernels.expm_gemm": 0.3,
    "kernels.horner": 0.2,
    "kernels.expm_scratch": 0.25,
    "kernels.tall": 0.3,
    "kernels.tall_gram": 0.31,
    "kernels.tall_combine": 0.31,
    "kernels.taylor": 0.31,
    "kernels.tall_blocks": 0.32,
    "kernels.tall_tile": 0.33,
    "kernels.elimination": 0.31,
    "kernels.curve": 0.32,
    "kernels.tall_cayley": 0.35,
    "kernels.householder": 0.35,
    "kernels.tall_expm": 0.35,
    "kernels.newton_schulz": 0.3,
    "kernels.power_iteration": 0.2,
    "kernels.spectral_norm": 0.25,
    "kernels.weight_norm": 0.2,
    "kernels.aot": 0.4,
    "numerics": 1,
    "transaction": 1,
    "injected": 1,
    "logm": 1.1,
    "preimage": 1.1,
    "polynomials": 1,
    "slices": 1,
    "exponential": 1.1,
    "turns": 1,
    "tables": 1.8,
    "configs": 1.9,
    "failures": 1.9,
    "paths": 2,
    "registry": 2.05,
    "links": 2,
    "tall_kernels": 2.1,
    "orthogonal": 2.1,
    "cache": 2.1,
    "autograd": 2.1,
    "once": 2.2,
    "together": 2.2,
    "ops": 3,
    "ops.cayley": 3,
    "ops.expm": 3,
    "ops.householder": 3,
    "ops.spectral_norm": 3,
    "ops.tall_cayley": 3,
    "ops.tall_expm": 3,
    "ops.weight_norm": 3,
    "stepped": 3.1,
    "orthogonal_maps": 3.2,
    "rules": 4,
    "functional": 4.1,
    "interop": 4.1,
    "declared": 4.2,
    "constraints": 4,
    "legacy": 4,
    "fuse": 5,
    "pytest_plugin": 5.1,
    "register": 5.1,
    "explain": 5.1,
    "info": 5.1,
    "report": 5.4,
    "doctor": 5.4,
    "bench": 5.5,
    "parametrizations": 5.2,
    "reading": 5.1,
    "samples": 5.2,
    "surroundings": 5.2,
    "trials": 5.2,
    "tuner": 5.3,
    "rnn": 5.2,
    "tritonparam": 6,
    "demos": 7,
    "demos.options": 7,
    "demos.digits": 7.1,
    "demos.pair": 7.1,
    "demos.shown": 7.2,
    "demos.gan": 7.3,
    "demos.rnn": 7.3,
    "demos.spd": 7.3,
    "demos.commands": 7.4,
    "cli": 8,
    "__main__": 9,
}
FILES = {
    **{f"kernels.{p.stem}": p for p in (ROOT / "kernels").glob("*.py")},
    **{
        ".".join(p.relative_to(ROOT / "tritonparam").with_suffix("").parts): p
        for p in (ROOT / "tritonparam").rglob("*.py")
    },
}
FILES = {
    name.removesuffix(".__init__") if name != "__init__" else "tritonparam": path
    for name, path in FILES.items()
}


def imports(path: Path) -> set[str]:
    """The full names of what a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(name: str) -> str | None:
    """The file among ours that an imported name comes from."""
    if name.split(".")[0] != "tritonparam":
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts) or "tritonparam"


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name):
    for imported in imports(FILES[name]):
        lower = ours(imported)
        if lower is not None:
            assert FLOORS[lower] < FLOORS[name], f"{name} imports {imported}"
        if imported.split(".")[0] == "triton":
            assert name.startswith("kernels"), f"{name} imports triton"
        if name.startswith("kernels") and lower is not None:
            assert lower.startswith("kernels"), f"{name} imports {imported}"


def test_every_file_has_a_floor():
    assert set(FILES) == set(FLOORS)


def test_without_triton():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "typer", "rich", "matplotlib", "sklearn", "numpy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
import torch, tritonparam as tp
layer = tp.register_parametrization(torch.nn.Linear(4, 4), "weight", tp.Skew(), tp.CayleyMap())
layer(torch.ones(1, 4)).sum().backward()
with tp.use_path("composed"):
    layer.weight
assert tp.explain(layer)[0].reason == "triton is not installed", tp.explain(layer)
assert "triton" not in sys.modules
print(tp.stats())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "{'kernel': 0, 'closed': 1, 'composed': 1}"


def test_importing_does_not_import_triton():
    code = "import sys, tritonparam; print('triton' in sys.modules, 'typer' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False False"
