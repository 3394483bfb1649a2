"""The program, put together of its commands. They import late what takes long to import, so that `--help` is quick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .bench import bench
from .chat import chat
from .demo import demo, demo_model
from .doctor import doctor
from .plan import plan
from .pull import pull
from .quantizing import imatrix, quantize
from .run import run
from .serve import serve
from .show import devices, inspect
from .trace import trace
from .tune import tune
from .worker import worker

if TYPE_CHECKING:
    from collections.abc import Callable

# In the order of `--help`.
_COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    chat,
    pull,
    plan,
    bench,
    trace,
    tune,
    quantize,
    imatrix,
    inspect,
    devices,
    doctor,
    serve,
    worker,
    demo_model,
    demo,
)

app = typer.Typer(
    help="Run Mixture-of-Experts models that are larger than the GPU's memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from llama_moe import __version__

        typer.echo(f"llama-moe {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Run Mixture-of-Experts models that are larger than the GPU's memory."""


for command in _COMMANDS:
    app.command()(command)
