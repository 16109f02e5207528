"""The demos as commands: their options, and the defaults that take seconds."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

NAMES = ("rnn", "gan", "spd")

Steps = Annotated[int, typer.Option(help="Training steps of each of the two runs.")]
Batch = Annotated[int, typer.Option(help="How much is shown in a step.")]
Rate = Annotated[float, typer.Option("--lr", help="Learning rate at the start.")]
Device = Annotated[
    str | None, typer.Option(help="Where to train.  [default: cuda where there is one, or cpu]")
]
Threads = Annotated[int, typer.Option(help="Threads of the CPU.")]
Seed = Annotated[int, typer.Option(help="Of the data, the weights and the batches.")]
Output = Annotated[Path, typer.Option(help="Where the plot goes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only print the last lines.")]


class DType(str, enum.Enum):
    """What a GAN can be trained in."""

    float64 = "float64"
    float32 = "float32"


class Map(str, enum.Enum):
    """The maps that make a weight orthogonal."""

    cayley = "cayley"
    exp = "exp"
    householder = "householder"


def rnn(
    orthogonal_map: Annotated[
        Map, typer.Option("--map", help="What makes the recurrent weight orthogonal.")
    ] = Map.cayley,
    hidden: Annotated[int, typer.Option(help="The size of the recurrent weight.")] = 128,
    steps: Steps = 200,
    batch: Batch = 64,
    lr: Rate = 0.01,
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
    output: Output = Path("demo_rnn.png"),
    quiet: Quiet = False,
) -> None:
    """Read handwritten digits pixel by pixel with an orthogonal RNN."""
    from tritonparam.demos import rnn
    from tritonparam.demos.options import Options

    options = Options(output, steps, batch, lr, device, threads, seed, quiet)
    _run(rnn.run, options, orthogonal_map=orthogonal_map.value, hidden=hidden)


def gan(
    width: Annotated[int, typer.Option(help="Of the hidden layers.")] = 64,
    dtype: Annotated[
        DType, typer.Option(help="In float32 rounding parts the two runs.")
    ] = DType.float64,
    steps: Steps = 400,
    batch: Batch = 128,
    lr: Rate = 0.01,
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
    output: Output = Path("demo_gan.png"),
    quiet: Quiet = False,
) -> None:
    """Learn eight clusters with a GAN whose critic has spectral norms."""
    from tritonparam.demos import gan
    from tritonparam.demos.options import Options

    options = Options(output, steps, batch, lr, device, threads, seed, quiet)
    _run(gan.run, options, width=width, dtype=dtype.value)


def spd(
    steps: Steps = 150,
    batch: Batch = 128,
    lr: Rate = 0.02,
    device: Device = None,
    threads: Threads = 1,
    seed: Seed = 0,
    output: Output = Path("demo_spd.png"),
    quiet: Quiet = False,
) -> None:
    """Learn the distance that tells handwritten digits apart."""
    from tritonparam.demos import spd
    from tritonparam.demos.options import Options

    _run(spd.run, Options(output, steps, batch, lr, device, threads, seed, quiet))


def _run(demo: Callable[..., Any], *args: Any, **own: Any) -> None:
    from tritonparam.demos.options import BadOption, MissingPackage

    try:
        demo(*args, **own)
    except BadOption as error:
        raise typer.BadParameter(str(error)) from None
    except MissingPackage as error:
        sys.exit(f"tritonparam: {error}")
