"""`python -m tests.on_gpu`, on the CPU and few tests."""

import pytest

from tests import on_gpu


def test_every_test_is_in_one_part(monkeypatch):
    found = []
    for part in range(5):
        monkeypatch.setenv(on_gpu.PART, f"{part}/5")
        found += on_gpu.of_this_process(list(range(13)))
    assert found == list(range(13))
    monkeypatch.delenv(on_gpu.PART)
    assert on_gpu.of_this_process([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("chosen", "status", "said"),
    [("_within", 0, "1 passed"), ("_beyond", 1, "beyond its bound"), ("_none", 0, "deselected")],
    ids=["passes", "fails", "empty"],  # part of the file's path, in which pytest, too, looks
)
def test_parts_pass_or_fail(chosen, status, said, tmp_path, monkeypatch, capsys):
    file = tmp_path / "test_some.py"
    failing = "assert False, 'beyond its bound'"
    file.write_text(f"def test_within(): pass\n\n\ndef test_beyond(): {failing}\n")
    monkeypatch.setattr(on_gpu, "PARTS", 1)
    assert on_gpu.main(["100", str(file), "-k", chosen]) == status
    assert said in capsys.readouterr().out


def test_what_takes_too_long_is_stopped(tmp_path, monkeypatch, capsys):
    file = tmp_path / "test_slow.py"
    file.write_text("import time\n\n\ndef test_slow(): time.sleep(100)\n")
    monkeypatch.setattr(on_gpu, "PARTS", 2)
    assert on_gpu.main(["0.5", str(file)]) == 1
    assert capsys.readouterr().out.count("stopped at 0.5 s") == 2


def test_without_a_gpu_nothing_is_started(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert on_gpu.main(["0"]) == 1
    assert capsys.readouterr().out == f"tests.on_gpu: {on_gpu.NO_GPU}\n"
