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
from tritonparam.demos import commands, gan, pair, rnn, shown, spd
from tritonparam.demos.options import BadOption, Options

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
    options = Options(tmp_path / "plot.png", STEPS, batch=32, lr=0.01, device="cpu", quiet=True)
    history = rnn.run(options, hidden=16)
    composed, fused = history.runs["composed"], history.runs["fused"]
    assert composed.evaluations == {"composed": STEPS}
    assert fused.evaluations == {"closed": STEPS}
    assert (composed.path, fused.path) == ("composed", "closed")
    assert shown.loss_difference(history)[0] <= LOSS_TOLERANCE
    assert composed.losses["training"][-1] < composed.losses["training"][0]
    assert len(composed.seconds) == len(fused.seconds) == STEPS
    assert max(composed.scores["defect"] + fused.scores["defect"]) < 1e-4
    printed = capsys.readouterr().out
    assert printed.startswith("A fused step takes ")
    assert "explain" not in printed


def test_gan_trains_the_same_game_twice(tmp_path):
    from matplotlib.image import imread

    output = tmp_path / "plot.png"
    small = ["--width", "8", "--steps", STEPS, "--batch", "16", "--device", "cpu"]
    result = invoke("demo", "gan", *small, "--output", output)
    assert result.exit_code == 0, result.output
    # Four weights of the critic, read by a step of either player.
    assert re.search(rf"^ composed +composed .* {2 * 4 * STEPS} composed ", result.output, re.M)
    assert re.search(rf"^ fused +closed .* {2 * 4 * STEPS} closed ", result.output, re.M)
    (apart,) = re.findall(r"samples for the same noise differ by at most (\S+)\.", result.output)
    assert float(apart) <= 1e-9  # fp64: a few steps amplify its rounding a thousandfold
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert imread(output).std() > 0.05  # not a blank page


def test_the_energy_distance_is_zero_between_samples_of_one_distribution():
    generator = torch.Generator().manual_seed(0)
    x, y = (gan.points(500, generator) for _ in range(2))
    assert gan.distance(x, x) == pytest.approx(0, abs=1e-6)
    assert abs(gan.distance(x, y)) < 0.02
    assert gan.distance(x, y + 1) > 0.5
    assert float((torch.cdist(x, gan.centres()).amin(1) <= 3 * gan.SPREAD).double().mean()) > 0.98


def test_spd_learns_the_same_distance_twice(tmp_path, capsys):
    from matplotlib.image import imread

    options = Options(tmp_path / "plot.png", 2 * STEPS, batch=64, lr=0.05, device="cpu")
    history = spd.run(options)
    composed, fused = history.runs["composed"], history.runs["fused"]
    assert (composed.evaluations, fused.evaluations) == (
        {"composed": 2 * STEPS},
        {"closed": 2 * STEPS},
    )
    assert shown.loss_difference(history)[0] <= 1e-5
    euclidean, *_, learned = fused.scores["accuracy"]
    assert euclidean == pytest.approx(0.903, abs=1e-3)
    assert learned > euclidean + 0.005
    printed = capsys.readouterr().out
    assert re.search(r"^ fused +closed .* 90\.3% +9\d\.\d%$", printed, re.M)
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert imread(options.output).std() > 0.05  # not a blank page


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("gan", "--width", "0"), "--width must be at least 1, got 0."),
        (("gan", "--dtype", "float16"), "'float64', 'float32'"),
        (("gan", "--steps", "0"), "--steps must be at least 1, got 0."),
        (("spd", "--batch", "5000"), "--batch must be at most the 1437 training images, got 5000."),
        (("spd", "--output", "plot.pdf"), "--output must be the name of a .png file"),
    ],
)
def test_the_other_demos_name_a_bad_option(arguments, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    assert why in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_plot_that_cannot_be_written(tmp_path):
    from matplotlib.figure import Figure

    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadOption, match=r"--output must be the name of a \.png file"):
        Options(tmp_path / "folder.png", 1, 1, 0.1).place()
    plot = object.__new__(shown.Plot)
    plot._figure = Figure()
    with pytest.raises(BadOption, match=r"a file that can be written \(Is a directory\)"):
        plot.save(tmp_path / "folder.png")


@pytest.mark.parametrize("orthogonal_map", list(rnn.MAPS))
def test_rnn_starts_from_the_same_rotations_with_every_map(orthogonal_map):
    weights = [rnn.build(3, 7, name).recurrent.weight for name in ("cayley", orthogonal_map)]
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.equal(weights[0], torch.eye(7))


def test_a_demo_says_when_the_losses_come_apart():
    def history(*fused):
        runs = {
            "composed": pair.Run("composed", "", losses={"a": [1.0, 1.0], "b": [2.0, 2.0]}),
            "fused": pair.Run("closed", "", losses={"a": list(fused), "b": [2.0, 2.0]}),
        }
        return pair.History(runs, [], "", "")

    assert "came apart" not in shown.losses_line(history(1.0, 1.000001))
    assert "(at step 2)" in shown.losses_line(history(1.0, 1.000001))
    assert "came apart" in " ".join(shown.losses_line(history(1.5, 1.0)).split())
    assert "diverged" in shown.losses_line(history(1.0, float("nan")))


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
    assert [choice.value for choice in commands.Map] == list(rnn.MAPS)
    assert [choice.value for choice in commands.DType] == list(gan.DTYPES)


def test_demo_alone_lists_the_demos():
    for arguments in (["demo"], ["demo", "--help"]):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert re.search(r"^  rnn  +Read handwritten digits", result.output, re.M)
        assert re.search(r"^  gan  +Learn eight clusters", result.output, re.M)
        assert re.search(r"^  spd  +Learn the distance", result.output, re.M)
    unknown = invoke("demo", "gnu")
    assert unknown.exit_code == 2
    assert "must be one of rnn, gan, spd, got 'gnu'" in unknown.output


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
