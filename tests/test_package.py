"""The wheel and the sdist hold the kernels, and a wheel works where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "kernels/__init__.py": "tritonparam/kernels/__init__.py",
    "kernels/cayley.py": "tritonparam/kernels/cayley.py",
    "tritonparam/ops/cayley.py": "tritonparam/ops/cayley.py",
    "tritonparam/demos/rnn.py": "tritonparam/demos/rnn.py",
    "tritonparam/py.typed": "tritonparam/py.typed",
    "tritonparam/tuned_configs.json": "tritonparam/tuned_configs.json",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip("setuptools")
    tmp = tmp_path_factory.mktemp("package")
    source = tmp / "source"
    tracked = ("pyproject.toml", "README.md", "LICENSE", "kernels", "tritonparam")
    source.mkdir()
    for name in tracked:
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", source]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tmp


def test_contents(built):
    (wheel,), (sdist,) = (list((built / "dist").glob(f"*.{end}")) for end in ("whl", "tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    assert set(FILES.values()) <= set(names)
    assert {name.split("/")[0] for name in names} == {"tritonparam", "tritonparam-0.1.0.dist-info"}
    with tarfile.open(sdist) as tar:
        members = {member.split("/", 1)[-1] for member in tar.getnames()}
    assert set(FILES) <= members


def test_wheel_works_where_it_is_installed(built):
    (wheel,) = (built / "dist").glob("*.whl")
    target = built / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--target",
        target,
        wheel,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    code = (
        "import torch, tritonparam as tp, tritonparam.kernels;"
        "m = torch.nn.Linear(3, 3);"
        "tp.register_parametrization(m, 'weight', tp.Skew(), tp.CayleyMap());"
        "print(tp.__file__, tritonparam.kernels.__file__, (m.weight @ m.weight.T).trace().item())"
    )
    env = dict(os.environ, PYTHONPATH=str(target))
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=built, capture_output=True, text=True, check=True
    )
    package, kernels, trace = run.stdout.split()
    assert package.startswith(str(target))
    assert kernels.startswith(str(target))
    assert abs(float(trace) - 3) < 1e-4
