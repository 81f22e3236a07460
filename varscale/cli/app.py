"""The verbs together, and what their errors look like."""

import logging
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import typer
import typer.core

from varscale.cli import (
    advice,
    designs,
    editing,
    evaluations,
    forecasts,
    inspection,
    laws,
    sampling,
    searches,
    single_runs,
    studies,
    tables,
)
from varscale.cli.options import MENDABLE
from varscale.errors import ExperimentError

VERBS = (
    *(designs.init, designs.design_tokenizer, studies.sweep, studies.plan, studies.status, searches.tune),
    *(single_runs.train, single_runs.train_tokenizer, single_runs.tokenize, single_runs.run_job, sampling.sample),
    *(
        editing.edit,
        editing.reconstruct,
        inspection.inspect,
        evaluations.evaluate,
        tables.table,
        laws.fit_laws,
        forecasts.forecast,
        advice.advise,
        studies.dashboard,
        studies.sync,
        single_runs.import_official,
        single_runs.export_official,
    ),
)

# of Click, or of Typer's own copy of it, as the installed version has it
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])


class _Commands(typer.core.TyperGroup):
    """The verbs; an interrupted one says so, and an empty argument is a mistake, which Typer alone doesn't see."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, argument in zip(("varscale", *args), args, strict=False):
            if not argument.strip() or re.fullmatch(r"--[a-z-]+=\s*", argument):  # --out "$UNSET" would be this folder
                option = argument.strip().rstrip("=") or before
                raise ExperimentError(f"{option}: an empty value follows; is a variable of the shell unset?")
        return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns an interruption into an exit
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            typer.echo("varscale: interrupted; what is done is kept, call it again to go on", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Scaling-law studies of visual autoregressive (next-scale prediction) image models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command(name=verb.__name__.replace("_", "-"))(verb)


def main() -> None:
    """Run the command; errors that a person can mend are one line, without traceback."""
    _refuse_shadowed_packages()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows ASCII alone shows "?" for the rest
            stream.reconfigure(errors="replace")
    _show_warnings()
    os.umask(os.umask(0o077) | 0o002)  # nothing below a runs folder may be written to by everybody
    try:
        sys.exit(app(prog_name="varscale", standalone_mode=False) or 0)
    except _UsageError as error:
        typer.echo(f"varscale: {_of_usage(error)}", err=True)
        sys.exit(2)
    except MENDABLE as error:
        sys.exit(f"varscale: {_of_mistake(error)}")
    except MemoryError:
        sys.exit("varscale: out of memory; let fewer images, or smaller models, be held at once")


def _of_usage(error: Any) -> str:
    """What is wrong with a command line, of which verb, and where its options are listed."""
    verbs = app.registered_commands
    named = next((verb.name for verb in verbs if verb.name in sys.argv[1:2]), None)
    called = error.ctx.command_path if error.ctx is not None else f"varscale {named or ''}".strip()
    problem = error.format_message().removeprefix("Invalid value: ").replace(". Did you mean", "; did you mean")
    if hasattr(error.__cause__, "errors"):  # pydantic's, with which Typer reads values; it doesn't name them
        first = error.__cause__.errors()[0]
        option, given = error.param.opts[0], str(first["input"])[:100]
        problem = f"{option} {given}: {_lower(first['msg'].removeprefix('Value error, '))}"
    problem = " ".join(_lower(problem).split())[:400].rstrip(".")
    place = f"{called.removeprefix('varscale').strip()}: ".removeprefix(": ")
    return f"{place}{problem}; see `{called} --help`"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _of_mistake(error: Exception) -> str:
    """Its message on one line; of a file that can't be used, the file first."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        message = f"{error.filename}: {error.strerror}"
    return " ".join(message.split())


def _show_warnings() -> None:
    """Print varscale's own warnings, such as a damaged file's name, a line each on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("varscale: %(message)s"))
    logger = logging.getLogger("varscale")
    logger.addHandler(handler)
    logger.propagate = False


def _refuse_shadowed_packages() -> None:
    """Stop when `sweeps` or `analysis` of another project would be imported instead of ours."""
    home = Path(__file__).resolve().parents[2]
    for package in ("sweeps", "analysis"):
        spec = find_spec(package)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != home / package:
            found = "missing" if spec is None else f"shadowed by {spec.origin or spec.submodule_search_locations}"
            sys.exit(f"varscale: its package {package!r} is {found}; run varscale from another folder or environment")
