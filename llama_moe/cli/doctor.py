"""`llama-moe doctor`: what is there, what is missing, what to install."""

from __future__ import annotations

import json

import typer

from . import options
from .console import EXIT_FAILURE, exit_codes


@exit_codes()
def doctor(*, as_json: options.Json = False) -> None:
    """Show what was found of CPU features, devices, plug-ins and drivers, what is missing, and what to install.

    The exit status is 1 if a part of the installation is broken. A GPU that is not used is no fault.
    """
    from llama_moe.diagnosis import diagnose

    diagnosis = diagnose()
    typer.echo(json.dumps(diagnosis.to_dict(), indent=2) if as_json else str(diagnosis))
    if diagnosis.broken:
        raise typer.Exit(EXIT_FAILURE)
