"""`llama-moe doctor`: what is there, what is missing, what to install."""

from __future__ import annotations

import json

import typer

from llama_moe.diagnosis import diagnose

from .console import EXIT_FAILURE


def show_diagnosis(*, as_json: bool) -> None:
    """Writes what was found; ends with status 1 if a part of the installation is broken."""
    diagnosis = diagnose()
    typer.echo(json.dumps(diagnosis.to_dict(), indent=2) if as_json else str(diagnosis))
    if diagnosis.broken:
        raise typer.Exit(EXIT_FAILURE)
