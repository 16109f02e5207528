"""What surrounds every command: the environment and the stream that it prints to."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings

import pytest
import torch

pytest.importorskip("typer")

import tritonparam as tp
from tritonparam import cli


@pytest.fixture
def run(monkeypatch):
    """Runs ``main`` with arguments, and returns the exit code."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def run(*arguments, stdout=None):
        monkeypatch.setattr(sys, "argv", ["tritonparam", *arguments])
        if stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return run


def test_a_path_that_is_none_is_one_sentence(run, monkeypatch, capsys):
    monkeypatch.setattr(tp.paths, "_override", "fast")  # as TRITONPARAM_PATH does
    assert run("info") == 2
    assert capsys.readouterr() == (
        "",
        "tritonparam: TRITONPARAM_PATH: the path must be one of kernel, closed, composed, "
        "got 'fast'.\n",
    )


def model():
    return tp.weight_norm(torch.nn.Linear(3, 3))


def test_what_the_encoding_lacks_is_replaced(run):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert not run("explain", f"{__name__}:model", stdout=screen)
    assert "3?3" in screen.buffer.getvalue().decode("ascii")


class Broken(io.StringIO):
    """A stream that takes everything, and whose flush fails."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


def test_a_full_disk_is_one_sentence(run):
    assert run("info", stdout=Broken(errno.ENOSPC)) == (
        f"tritonparam: what was to be written is not: {os.strerror(errno.ENOSPC)}."
    )


def test_a_reader_that_has_left_is_told_nothing(run, capsys):
    assert run("info", stdout=Broken(errno.EPIPE)) == 1
    assert capsys.readouterr().err == ""
