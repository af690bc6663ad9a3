"""`labkit ...`: the command line. It reads arguments, calls the library, prints; nothing is computed here.

Each command takes --json (one JSON object on stdout and nothing else) and exits with 0, 1 (it failed) or 2 (wrong usage).
Heavy imports wait until a command needs them, so that `labkit --help` answers at once.
"""

import sys
from collections.abc import Callable

import typer

from labkit.cli import bench, course, launch, predict, serve

app = typer.Typer(
    help="The Model Parallelism Lab: serve one language model from several devices, and measure it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    serve.doctor, serve.generate, serve.serve, predict.dryrun, predict.predict, predict.plan, course.lessons, course.grade,
    course.progress,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)
app.command("next")(course.next_step)
app.command()(course.lab)
app.add_typer(bench.bench, name="bench")
app.add_typer(launch.launch, name="launch")


def main() -> None:
    """Runs the command. What the user can mend is one line on stderr, without a traceback: exit 2 for a value that can't
    be used, 1 for a model or a rank that failed."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        from labkit.launch.local import RankError
        from labkit.links import LinkError
        from labkit.model.errors import ModelError

        if not isinstance(error, ValueError | RankError | LinkError | OSError):
            raise
        print(f"labkit: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) and not isinstance(error, ModelError) else 1) from None
