"""The command line, ``tritonparam`` or ``python -m tritonparam``: it reads options and calls.

What a command runs is imported inside it, so that help and bad options are answered at once.
"""

from __future__ import annotations

import errno
import io
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

try:
    import typer
    import typer.core
except ModuleNotFoundError:
    typer = None  # type: ignore[assignment]
else:
    # What several commands are asked for.
    Model = Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:CALLABLE", help="A function without arguments that makes the model."
        ),
    ]
    Chains = Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Without a model: a chain, as cayley; may be repeated."),
    ]
    Batch = Annotated[int, typer.Option(help="How many matrices.")]
    DType = Annotated[str, typer.Option(help="Of the originals.")]
    Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def main() -> None:
    """Run the command line; without typer, say in one sentence how to get it and exit with 1."""
    if typer is None:
        sys.exit("tritonparam: the command line needs typer; pip install 'tritonparam[demo]'")
    from tritonparam import paths

    try:
        paths.override()
    except ValueError as error:
        print(f"tritonparam: {error}", file=sys.stderr)
        sys.exit(2)
    warnings.formatwarning = _one_line
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # tables have × and →, which not all encodings do
    try:
        try:
            application()()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        sys.stdout = None  # or Python tries it again as it ends
        if error.errno == errno.EPIPE:  # as of head, which has read what it wanted
            sys.exit(1)
        sys.exit(f"tritonparam: what was to be written is not: {error.strerror}.")


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning without the line of code that gives it."""
    return f"{category.__name__}: {message}\n"


def application() -> typer.Typer:
    """The commands, for ``main`` and for tests."""
    from tritonparam.demos import commands

    class Commands(typer.core.TyperGroup):
        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            known = self.list_commands(ctx)
            if args[0] not in known:
                ctx.fail(f"the command must be one of {', '.join(known)}, got {args[0]!r}.")
            return super().resolve_command(ctx, args)

    app = typer.Typer(
        cls=Commands, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
    )
    demo = typer.Typer(
        cls=Commands, rich_markup_mode=None, help="Train something small, composed and fused."
    )
    app.callback(invoke_without_command=True)(help_when_alone)
    demo.callback(invoke_without_command=True)(help_when_alone)
    app.command("info")(info)
    app.command("doctor")(doctor)
    app.command("tune")(tune)
    app.command("bench")(bench)
    app.command("explain")(explain)
    for name in commands.NAMES:
        demo.command(name)(getattr(commands, name))
    app.add_typer(demo, name="demo")
    return app


def help_when_alone(context: typer.Context) -> None:
    """Constrained weights in PyTorch at the cost of unconstrained ones."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def info(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile every kernel and show what it uses.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GPU",
            help="With --kernels: a GPU to compile for, as sm_90 or gfx942; may be repeated.  "
            "[default: the GPU present, or sm_80, sm_90, sm_100 and gfx942]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions, the device, if kernels run there, and your table."""
    from tritonparam import info

    try:
        print(info.report(kernels=kernels, targets=target, as_json=as_json))
    except info.BadOption as error:
        raise typer.BadParameter(str(error)) from None
    except info.Unavailable as error:
        sys.exit(f"tritonparam: {error}")


def doctor(
    as_json: Json = False,
) -> None:
    """Check that everything works here.

    It takes a minute at most, says what is wrong and what to do, and exits with 1 if anything is.
    """
    from tritonparam import doctor

    results = []
    for result in doctor.run(doctor.checks()):
        results.append(result)
        if not as_json:
            print(result, flush=True)
    print(doctor.as_json(results) if as_json else doctor.summary(results))
    if any(result.status == "failed" for result in results):
        raise typer.Exit(1)


def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE", help="A function without arguments that makes the model."
        ),
    ],
    fuse: Annotated[bool, typer.Option("--fuse", help="Fuse the model first.")] = False,
    legacy: Annotated[
        bool, typer.Option("--legacy", help="With --fuse: convert torch.nn.utils' hooks as well.")
    ] = False,
    errors: Annotated[
        bool, typer.Option("--errors", help="Measure how far weights are from their constraints.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where a weight is composed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the path of each parametrized weight of a model, and why."""
    from tritonparam import report

    try:
        rows = report.rows(model, fused=fuse, legacy=legacy, errors=errors)
    except report.BadOption as error:
        raise typer.BadParameter(str(error)) from None
    print(report.as_json(rows) if as_json else rows)
    if strict and any(row.path == "composed" for row in rows):
        raise typer.Exit(1)


def tune(
    model: Model = None,
    chain: Chains = None,
    n: Annotated[
        list[int] | None,
        typer.Option(
            "--n", metavar="N", help="Its size, n of n×n, or a norm's n numbers; may be repeated."
        ),
    ] = None,
    batch: Batch = 1,
    dtype: DType = "float32",
    device: Annotated[
        str | None,
        typer.Option(help="Where to measure.  [default: cuda where there is one, or cpu]"),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Compile every candidate, and measure nothing.")
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GPU",
            help="With --static: a GPU to compile for, as sm_90; may be repeated.  "
            "[default: sm_90]",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is known already.")] = False,
    ship: Annotated[
        bool, typer.Option("--ship", help="Put your table into the package's as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the fastest path and launch configuration, and keep it.

    It goes into a table of your own, which later processes follow, as soon as it is known: an
    interrupted run goes on where it was. What is measured speaks for all sizes, and batches, of
    the same next power of two: of 96 and 128 only the first is measured.
    """
    from tritonparam import report, tables

    try:
        found = report.tunings(
            model,
            chains=chain or (),
            sizes=n or (),
            batch=batch,
            dtype=dtype,
            device=device,
            static=static,
            gpus=target or (),
            again=again,
            ship=ship,
            track=_track,
        )
    except report.BadOption as error:
        raise typer.BadParameter(str(error)) from None
    except KeyboardInterrupt:
        if not static:
            print("interrupted: what was measured is kept; run it again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(report.tunings_as_json(found))
    elif found:
        print("\n\n".join(map(str, found)))
    else:
        print("everything was measured before; --again measures it anew")
    if ship:
        print(f"shipped: all rows of your table are in {tables.SHIPPED}", file=sys.stderr)


def bench(
    model: Model = None,
    chain: Chains = None,
    n: Annotated[
        list[int] | None,
        typer.Option("--n", metavar="N", help="Its size, n of n×n; may be repeated."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Of tall chains and norms, whose columns are n.  [default: 8 n]"),
    ] = None,
    batch: Batch = 1,
    dtype: DType = "float32",
    device: Annotated[
        str | None, typer.Option(help="Where to time.  [default: cuda where there is one, or cpu]")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time torch's chain under torch.compile as well.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="How long each weight is timed, about.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Time torch's chains against the fused paths.

    Forward, backward and both, in turn: the median and the 20th to 80th percentile. What differs
    from fp64 by more than rounding is not timed.
    """
    from tritonparam import bench

    found: list[bench.Timing] = []
    try:
        for timing in bench.run(
            model,
            chains=chain or (),
            sizes=n or (),
            rows=rows,
            batch=batch,
            dtype=dtype,
            device=device,
            compiled=compiled,
            seconds=seconds,
        ):
            if not as_json:
                print(timing if not found else f"\n{timing}", flush=True)
            found.append(timing)
    except bench.BadOption as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        print(bench.as_json(found))


def _track(tasks: Sequence[Any]) -> Iterable[Any]:
    """A progress bar on the screen, where rich draws one and there is something to do."""
    if not tasks:
        return tasks
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return tasks
    return track(tasks, "tuning", len(tasks), console=Console(stderr=True))
