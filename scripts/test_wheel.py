#!/usr/bin/env python3
"""Test wheels as a user has them: in a new environment, in a folder of their own, with nothing of this tree on the path.

    scripts/test_wheel.py dist/llama_moe-*.whl [--wheel PLUGIN.whl] [--with REQUIREMENT] [TEST ...]

The environment gets the wheels and what the tests need; the tests are copied next to it. `make test-wheel` runs it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of those that the tree's own tests need, the ones that these tests import.
REQUIREMENTS = ["gguf>=0.18", "httpx>=0.27", "psutil>=5.9", "pyelftools>=0.30", "pytest>=8.2", "pytest-timeout>=2.3", "uvloop>=0.19"]
# Besides those of wheels: aborts of ggml and exceptions through it, which cross from one library to another here, and placements.
TESTS = [
    "tests/wheel",
    "tests/native/test_load_errors.py",
    "tests/native/test_plugins.py",
    "tests/native/test_worker_failure.py",
    "tests/integration/test_placement.py",
    "tests/e2e/test_import.py",
]


def main() -> int:
    """Run the tests; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path, help="the wheel of llama_moe")
    parser.add_argument("--wheel", dest="wheels", type=Path, action="append", default=[], help="another one to install with it")
    parser.add_argument("--with", dest="requirements", action="append", default=[], help="another package to install")
    parser.add_argument("tests", nargs="*", default=TESTS, help="files and folders of tests")
    arguments = parser.parse_intermixed_args()  # files of tests may come after options
    with tempfile.TemporaryDirectory(prefix="llama_moe-wheel-") as directory:
        python = environment(Path(directory), [arguments.wheel, *arguments.wheels], arguments.requirements)
        shutil.copytree(ROOT / "tests", Path(directory) / "tests", ignore=shutil.ignore_patterns("__pycache__", "cpp"))
        shutil.copy(ROOT / "pyproject.toml", directory)  # pytest's settings
        environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return subprocess.run([python, "-m", "pytest", *arguments.tests], cwd=directory, env=environ, check=False).returncode


def environment(folder: Path, wheels: list[Path], requirements: list[str]) -> Path:
    """Make a virtual environment with the wheels; returns its Python."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *(str(wheel.resolve()) for wheel in wheels), *REQUIREMENTS, *requirements], check=True, cwd=folder)
    return python


if __name__ == "__main__":
    sys.exit(main())
