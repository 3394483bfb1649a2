"""The command line program `llama-moe`."""

from __future__ import annotations


def main() -> None:
    """Runs the program with the process's arguments, and exits."""
    from .app import app

    app(prog_name="llama-moe")
