"""The user's own table: where it lies, when it speaks, and how it is written."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import tritonparam as tp
from tests.test_configs import CLOSED, ROW
from tritonparam import configs, tables, tuner


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", str(tmp_path))
    configs.reload()
    yield tmp_path
    monkeypatch.undo()
    configs.reload()


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", "")
    assert tables.users_file() is None
    monkeypatch.delenv("TRITONPARAM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tables.users_file()
    assert file.parent == tmp_path / "tritonparam"
    for package, number in tables.versions().items():
        assert package + number in file.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.users_file() == tmp_path / ".cache" / "tritonparam" / file.name
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", "~/tuned")
    assert tables.users_file().parent == tmp_path / "tuned"


@pytest.mark.parametrize("asked", ["", "~/tuned"])
def test_without_a_home_there_is_no_table(monkeypatch, asked):
    """As a container's user who is nobody: no folder is called ~ in the current one."""

    def nobody(*_):
        raise KeyError

    pwd = pytest.importorskip("pwd")
    for name in ("HOME", "XDG_CACHE_HOME", "TRITONPARAM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    if asked:
        monkeypatch.setenv("TRITONPARAM_CACHE_DIR", asked)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert tables.users_file() is None
    with pytest.raises(ValueError, match="no table to write to, since no home is known; set"):
        tuner.tune(tp.weight_norm(torch.nn.Linear(2, 2)))


def test_a_folder_that_cannot_be_looked_into_has_no_table(monkeypatch, tmp_path):
    """As the home of another user, which a container may have."""
    monkeypatch.setenv("TRITONPARAM_CACHE_DIR", str(tmp_path / ("long" * 100)))
    assert tables.read(tables.users_file()) == {}
    with pytest.raises(ValueError, match="cannot be written"):
        tables.require_writable(tables.users_file())


def test_another_source_has_another_file(folder, monkeypatch):
    """An edited kernel is not launched with what was fastest for the one before."""
    tables.store([ROW], tables.users_file())
    monkeypatch.setattr(tables, "_source", lambda: "edited")
    assert not tables.users_file().exists()
    configs.reload()
    assert configs.fastest("cayley", torch.zeros(48, 48), 48) == ""


def test_the_source_is_that_of_kernels_operations_and_package(folder, monkeypatch):
    found = [folder / name / "some.py" for name in ("package", "package/ops", "kernels")]
    for file in found:
        file.parent.mkdir()
        file.write_text("a = 1\n")
    spec = SimpleNamespace(submodule_search_locations=[str(folder / "kernels")])
    monkeypatch.setattr(tables, "find_spec", lambda name: spec)
    monkeypatch.setattr(tables, "HERE", folder / "package")
    source = tables._source.__wrapped__
    digests = [source()]
    for file in found:
        file.write_text("a = 2\n")
        digests.append(source())
    assert len(set(digests)) == 4
    assert source() == digests[-1]


def test_it_has_the_last_word(folder, monkeypatch):
    shipped = folder / "shipped.json"
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    tables.store([ROW, CLOSED], shipped)
    assert "made_with" not in json.loads(shipped.read_text())
    tables.store([ROW | {"n": 64, "path": "composed", "config": {}}], tables.users_file())
    configs.reload()
    x = torch.zeros(48, 48)
    assert configs.fastest("cayley", x, 48) == "composed"
    assert configs.fastest("skew_exp", x, 48) == "closed"


def test_storing_replaces_what_speaks_for_the_same(folder):
    file = tables.users_file()
    tables.store([ROW, CLOSED], file)
    tables.store([ROW | {"n": 33, "config": {}}, ROW | {"batch": 2}], file)
    found = tables.read(file).values()
    assert sorted((row["chain"], row["n"], row["batch"]) for row in found) == [
        ("cayley", 33, 1),
        ("cayley", 48, 2),
        ("skew_exp", 48, 1),
    ]
    assert len(file.read_text().splitlines()) == 5  # a row a line
    with pytest.raises(ValueError, match="no such dtype, path or size"):
        tables.store([ROW | {"n": 0}], file)
    assert len(tables.read(file)) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content | {"format": 2}, "format 1"),
        (lambda content: content | {"made_with": {"torch": "1.0"}}, "it was made with"),
        (lambda content: content["rows"], "format 1"),
    ],
    ids=("newer", "foreign", "corrupt"),
)
def test_what_is_not_a_table_of_ours_is_a_warning_and_a_fresh_start(folder, change, reason):
    file = tables.users_file()
    tables.store([ROW], file)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.warns(UserWarning, match=reason):
        assert configs.fastest("cayley", torch.zeros(48, 48), 48) == ""
    with pytest.warns(UserWarning, match="is not used"):
        tables.store([CLOSED], file)
    assert [row["chain"] for row in tables.read(file).values()] == ["skew_exp"]


def test_a_writer_that_fails_leaves_the_file(folder, monkeypatch):
    file = tables.users_file()
    tables.store([ROW], file)

    def replace(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        tables.store([CLOSED], file)
    assert [row["chain"] for row in tables.read(file).values()] == ["cayley"]
    assert not list(folder.glob("*.new"))


def test_several_writers_at_once_lose_nothing(folder):
    # The lock is the open file's, not the process's: threads are kept apart as processes are.
    file = tables.users_file()
    rows = [ROW | {"n": 1 << n} for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: tables.store([row], file), rows))
    assert sorted(row["n"] for row in tables.read(file).values()) == [row["n"] for row in rows]
