#!/usr/bin/env python3
"""Print the directory of a CUDA 13 toolkit with cuBLAS, putting one together from NVIDIA's wheels when there is none.

In this order:

1. ``$CUDA_HOME``, ``$CUDA_PATH``, the toolkit whose ``nvcc`` is on ``PATH``, and ``/usr/local/cuda``;
2. the cache (see ``fetch_llama_cpp.py``);
3. the wheels that ``cuda_toolkit.txt`` names: pip fetches them, about 600 MB, once, into the cache.

No GPU, driver or root is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fetch_llama_cpp import FetchError, cache_dir, say, scratch_directory

WHEELS = Path(__file__).resolve().parent / "cuda_toolkit.txt"
MAJOR = 13


def is_toolkit(folder: Path) -> bool:
    """Whether a directory has all that the CUDA backend is built from."""
    header = folder / "include" / "cuda.h"
    try:
        version = re.search(r"#define CUDA_VERSION (\d+)", header.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False
    parts = ("bin/nvcc", "include/cublas_v2.h", "lib64/libcublas.so", "lib64/libcudart.so")
    return version is not None and int(version[1]) // 1000 == MAJOR and all((folder / part).exists() for part in parts)


def find(environ: Mapping[str, str] = os.environ) -> Path | None:
    """A toolkit that is on this machine; None when there is none."""
    candidates = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    compiler = shutil.which("nvcc", path=environ.get("PATH"))
    if compiler:
        candidates.append(Path(compiler).resolve().parent.parent)
    candidates += [Path("/usr/local/cuda"), assembled(environ)]
    return next((folder for folder in candidates if is_toolkit(folder)), None)


def assembled(environ: Mapping[str, str]) -> Path:
    """Where the toolkit out of wheels lies in the cache."""
    return cache_dir(environ) / f"cuda-toolkit-{MAJOR}"


def fetch(environ: Mapping[str, str] = os.environ) -> Path:
    """The directory of a toolkit; puts one together when :func:`find` has none."""
    toolkit = find(environ)
    if toolkit is not None:
        return toolkit
    say("fetching a CUDA toolkit: NVIDIA's wheels (about 600 MB, once)")
    with scratch_directory(cache_dir(environ)) as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--target", str(scratch), "--requirement", str(WHEELS)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode != 0:
            raise FetchError(f"pip could not fetch the CUDA toolkit:\n{result.stdout.strip()}\nOr install one and set CUDA_HOME.")
        tree = scratch / "nvidia" / f"cu{MAJOR}"
        link_libraries(tree)
        if not is_toolkit(tree):
            raise FetchError(f"the wheels of {WHEELS.name} are no toolkit of CUDA {MAJOR}; install one and set CUDA_HOME")
        try:
            tree.rename(assembled(environ))
        except OSError:
            if not is_toolkit(assembled(environ)):  # else another process was faster, which is as good
                raise
    return assembled(environ)


def link_libraries(tree: Path) -> None:
    """Add the names under which nvcc and the linker look for what the wheels have."""
    (tree / "lib64").symlink_to("lib")
    for library in (tree / "lib").glob("*.so.*"):
        name = tree / "lib" / f"{library.name.split('.so.')[0]}.so"
        if not name.exists():
            name.symlink_to(library.name)


def main() -> int:
    """Print the directory, or say on stderr what is wrong."""
    try:
        print(fetch())
    except FetchError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
