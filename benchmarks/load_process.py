"""Loads a model as a program of ours would, and prints the seconds that took: `python -m benchmarks.load_process MODEL THREADS CONTEXT`."""

from __future__ import annotations

import json
import sys
import time

import llama_moe


def main() -> None:
    """Loads the model named on the command line."""
    model, threads, context_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    begin = time.perf_counter()
    with llama_moe.load(model, experts="gpu", devices=[], context_size=context_size, threads=threads):
        print(json.dumps({"load_seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
