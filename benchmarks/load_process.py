"""Loads a model as a program of ours would: `python -m benchmarks.load_process MODEL THREADS CONTEXT`.

Prints the seconds that took, and the memory that this process had before: Python and its packages.
"""

from __future__ import annotations

import json
import sys
import time

import llama_moe
from benchmarks.memory import resident_bytes


def main() -> None:
    """Loads the model named on the command line."""
    model, threads, context_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    before = resident_bytes()
    begin = time.perf_counter()
    with llama_moe.load(model, experts="gpu", devices=[], context_size=context_size, threads=threads):
        print(json.dumps({"load_seconds": time.perf_counter() - begin, "before_bytes": before}))


if __name__ == "__main__":
    main()
