"""`python -m tests.on_gpu`, on the CPU and few tests."""

import os
import select
import signal
import subprocess
import time

import pytest

from tests import on_gpu, processes


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
    monkeypatch.setenv(on_gpu.OUT, str(tmp_path / "new" / "out"))
    assert on_gpu.main(["100", str(file), "-k", chosen]) == status
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "new" / "out" / "tests.log").read_text()


def test_what_takes_too_long_is_stopped(tmp_path, monkeypatch, capsys):
    file, begun = tmp_path / "test_slow.py", tmp_path / "begun"
    slow = f"open({str(begun)!r}, 'w'); time.sleep(100)"
    file.write_text(f"import time\n\n\ndef test_a(): assert 1 == 2\n\n\ndef test_b(): {slow}\n")
    monkeypatch.setattr(on_gpu, "PARTS", 1)
    monkeypatch.setattr(on_gpu.time, "monotonic", lambda: 0.0)
    wait = processes._status

    def when_begun(process, deadline):
        while not begun.exists() and process.poll() is None:
            time.sleep(0.05)
        return wait(process, 0.0 if deadline == 1.0 else 20.0)

    monkeypatch.setattr(processes, "_status", when_begun)
    assert on_gpu.main(["1", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "part 1 of 1: stopped at 1 s" in printed
    assert "assert 1 == 2" in printed  # what has failed until then


def test_processes_end_with_the_one_that_started_them():
    with pytest.raises(KeyboardInterrupt), processes.Processes() as running:
        process = running.start(["sleep", "100"])
        raise KeyboardInterrupt
    assert process.poll() == -signal.SIGKILL
    with pytest.raises(SystemExit), processes.Processes() as running:
        process = running.start(["sleep", "100"])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)
    assert process.poll() == -signal.SIGKILL


@pytest.mark.parametrize("waits", [True, False], ids=["stopped", "ended"])
def test_what_a_process_has_started_ends_with_it(waits):
    script = f"trap 'exit 0' INT; sleep 37 & echo begun; {'wait' if waits else 'exit 0'}"
    with processes.Processes() as running:
        process = running.start(["bash", "-c", script], stdout=subprocess.PIPE)
        assert os.read(process.stdout.fileno(), 100) == b"begun\n"
        if waits:
            assert list(running.wait(time.monotonic())) == [None]
        assert process.wait() == 0
    with process.stdout as pipe:  # is at its end when all who could write to it have ended
        assert select.select([pipe], [], [], 10.0)[0] == [pipe]
        assert pipe.read() == b""


def test_without_a_gpu_nothing_is_started(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments in ([], ["0"]):
        assert on_gpu.main(arguments) == 1
        assert capsys.readouterr().out == f"tests.on_gpu: {on_gpu.NO_GPU}\n"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert on_gpu.main([]) == 0
