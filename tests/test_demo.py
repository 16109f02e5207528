"""The demos and the command line that starts them, end to end and small."""

import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from typer.testing import CliRunner

from tritonparam import cli
from tritonparam.demos import rnn

STEPS = 6
SMALL = ["demo", "rnn", "--hidden", "16", "--steps", str(STEPS), "--batch", "32"]
PIXELS = 64
# A step rounds the state once for each pixel; W is orthogonal and tanh contracts, so that the
# roundings add up without growing, and so do those of successive steps in the parameters.
LOSS_TOLERANCE = STEPS * PIXELS * torch.finfo(torch.float32).eps


def invoke(*arguments):
    return CliRunner().invoke(cli.application(), [str(a) for a in arguments])


def test_rnn_prints_both_runs_and_writes_a_plot(tmp_path):
    from matplotlib.image import imread

    output = tmp_path / "plot.png"
    result = invoke(*SMALL, "--device", "cpu", "--output", output)
    assert result.exit_code == 0, result.output
    assert re.search(rf"^ composed +composed .* {STEPS} composed ", result.output, re.M)
    assert re.search(rf"^ fused +closed .* {STEPS} closed ", result.output, re.M)
    assert "Skew→CayleyMap" in result.output
    height, width, _ = imread(output).shape
    assert height > 300
    assert width > 900
    assert imread(output).std() > 0.05  # not a blank page


def test_rnn_trains_the_same_model_twice(tmp_path, capsys):
    history = rnn.run(
        hidden=16, steps=STEPS, batch=32, device="cpu", output=tmp_path / "plot.png", quiet=True
    )
    composed, fused = history.runs["composed"], history.runs["fused"]
    assert composed.evaluations == {"composed": STEPS}
    assert fused.evaluations == {"closed": STEPS}
    assert (composed.path, fused.path) == ("composed", "closed")
    assert rnn.loss_difference(history)[0] <= LOSS_TOLERANCE
    assert composed.losses[-1] < composed.losses[0]
    assert len(composed.seconds) == len(fused.seconds) == STEPS
    assert max(composed.defect, fused.defect) < 1e-4
    printed = capsys.readouterr().out
    assert printed.startswith("A fused step takes ")
    assert "explain" not in printed


@pytest.mark.parametrize("orthogonal_map", list(rnn.MAPS))
def test_rnn_starts_from_the_same_rotations_with_every_map(orthogonal_map):
    weights = [rnn.build(3, 7, name).recurrent.weight for name in ("cayley", orthogonal_map)]
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.equal(weights[0], torch.eye(7))


def test_rnn_says_when_the_losses_come_apart():
    def history(*fused):
        runs = {
            "composed": rnn.Run("composed", "", losses=[1.0, 1.0]),
            "fused": rnn.Run("closed", "", losses=list(fused)),
        }
        return rnn.History(runs, [], "", "")

    assert "came apart" not in rnn._losses_line(history(1.0, 1.000001))
    assert "(at step 2)" in rnn._losses_line(history(1.0, 1.000001))
    assert "came apart" in " ".join(rnn._losses_line(history(1.5, 1.0)).split())
    assert "diverged" in rnn._losses_line(history(1.0, float("nan")))


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("map", "qr", "'cayley', 'exp', 'householder'"),
        ("hidden", "1", "at least 2"),
        ("hidden", "many", "integer"),
        ("steps", "0", "at least 1"),
        ("batch", "0", "at least 1"),
        ("batch", "5000", "1437 training images"),
        ("lr", "-1", "positive"),
        ("lr", "nan", "positive"),
        ("threads", "0", "at least 1"),
        ("seed", "-1", "between 0"),
        ("device", "abacus", "a device of this machine"),
        ("output", "plot.pdf", ".png"),
        ("output", "no_such_folder/plot.png", "a folder that exists"),
    ],
)
def test_rnn_names_a_bad_option(option, value, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*SMALL, f"--{option}", value)
    assert result.exit_code == 2
    assert f"--{option}" in result.output
    assert wanted in result.output
    assert value in result.output or wanted == "integer"  # parsed by typer, in its own words
    assert not list(tmp_path.iterdir())


def test_the_command_line_offers_the_maps_that_there_are():
    assert [choice.value for choice in cli.Map] == list(rnn.MAPS)


def test_demo_alone_lists_the_demos():
    for arguments in (["demo"], ["demo", "--help"]):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert re.search(r"^  rnn  +Read handwritten digits", result.output, re.M)
    unknown = invoke("demo", "gnu")
    assert unknown.exit_code == 2
    assert "must be one of rnn, got 'gnu'" in unknown.output


@pytest.mark.parametrize(
    ("absent", "arguments"), [("typer", []), ("sklearn", SMALL), ("matplotlib", SMALL)]
)
def test_a_missing_package_is_one_sentence(absent, arguments, tmp_path):
    program = (
        "import sys; sys.modules[sys.argv[1]] = None; del sys.argv[1]; "
        "from tritonparam.cli import main; main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, absent, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.count("\n") == 1
    assert "pip install 'tritonparam[demo]'" in process.stderr
