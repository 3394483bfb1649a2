#!/usr/bin/env python3
"""Write llama_moe/_core.pyi from the built module, or with --check say whether it is what the module is.

The generator is pinned in pyproject.toml (extra "dev"), so equal modules give equal text.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "llama_moe" / "_core.pyi"
HEADER = "# Generated from the built module by scripts/stubs.py (`make stubs`); not edited by hand.\n"


def generate() -> str:
    """The stub of the module that is installed now, formatted."""
    importlib.import_module("llama_moe._core")  # a clear error here, when it is not built
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", "pybind11_stubgen", "llama_moe._core", "--output-dir", directory, "--exit-code"],
            check=True,
        )
        text = (Path(directory) / "llama_moe" / "_core.pyi").read_text(encoding="utf-8")
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(STUB), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return HEADER + formatted.stdout


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description="Write llama_moe/_core.pyi from the built module.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing; exit status 1 when they differ")
    arguments = parser.parse_args()
    text = generate()
    if not arguments.check:
        STUB.write_text(text, encoding="utf-8")
        return 0
    kept = STUB.read_text(encoding="utf-8") if STUB.exists() else ""
    if kept == text:
        return 0
    difference = difflib.unified_diff(kept.splitlines(True), text.splitlines(True), str(STUB.relative_to(ROOT)), "the built module")
    sys.stderr.writelines(difference)
    sys.stderr.write("llama_moe/_core.pyi does not describe the built module: run `make stubs` and commit the result\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
