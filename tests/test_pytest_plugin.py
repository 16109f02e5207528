"""The plugin that runs other people's tests fused: what it counts, requires and adds up."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

import tritonparam as tp
from tritonparam import pytest_plugin


def test_the_plugin_counts(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "import torch\n"
        "from torch.nn.utils.parametrizations import orthogonal\n"
        "def test_it():\n"
        "    layer = orthogonal(torch.nn.Linear(3, 3))\n"
        "    assert type(layer.parametrizations.weight).__name__ == 'FusedParametrizationList'\n"
        "    layer.weight, layer.weight\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tritonparam.pytest_plugin"]
    run = subprocess.run([*command, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "tritonparam: 0 kernel, 2 closed, 0 composed evaluations" in run.stdout


@pytest.mark.parametrize(("chosen", "closed"), [("nothing", 0), ("something", 1)])
def test_the_plugin_can_require_a_fused_evaluation(chosen, closed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pytest_plugin, "_of_workers", [])
    (tmp_path / "test_theirs.py").write_text(
        "import torch\n"
        "from torch.nn.utils.parametrizations import orthogonal\n"
        "def test_nothing():\n"
        "    pass\n"
        "def test_something():\n"
        "    orthogonal(torch.nn.Linear(3, 3)).weight\n"
    )
    options = ["-q", "-p", "tritonparam.pytest_plugin", "--import-mode=importlib"]
    code = pytest.main([*options, "--require-fused", "-k", chosen, str(tmp_path)])
    assert code == (0 if closed else 1)
    printed = capsys.readouterr().out
    assert f"tritonparam: 0 kernel, {closed} closed, 0 composed evaluations" in printed
    assert ("no weight was evaluated fused" in printed) == (not closed)


def test_the_plugin_adds_what_processes_counted(monkeypatch):
    monkeypatch.setattr(pytest_plugin, "_of_workers", [])
    tp.orthogonal(nn.Linear(3, 3)).weight
    worker = SimpleNamespace(workeroutput={})
    pytest_plugin.pytest_sessionfinish(SimpleNamespace(config=worker))
    assert worker.workeroutput["tritonparam"] == tp.stats(reset=True)
    pytest_plugin.pytest_testnodedown(worker)
    option = SimpleNamespace(require_fused=True)
    session = SimpleNamespace(config=SimpleNamespace(option=option), exitstatus=0)
    pytest_plugin.pytest_sessionfinish(session)
    assert session.exitstatus == 0
    pytest_plugin._of_workers.clear()
    pytest_plugin.pytest_testnodedown(SimpleNamespace())  # one that crashed
    pytest_plugin.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
