"""Streams greedy text with llama-cpp-python and reports the rate; one line of JSON for each number of tokens read from stdin."""

from __future__ import annotations

import json
import sys
import time

import llama_cpp


def main() -> None:
    """Loads the model named on the command line, then answers until stdin ends."""
    model, threads = sys.argv[1], int(sys.argv[2])
    llm = llama_cpp.Llama(model, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    bos = max(llm.token_bos(), 0)
    for line in sys.stdin:
        tokens = int(line)
        stream = llm.create_completion([bos], max_tokens=tokens, temperature=0, stream=True, logit_bias={llm.token_eos(): -1e9})
        # Tokens without whole characters share a chunk, so chunks are not counted: all tokens are there at the last one.
        times = [time.perf_counter() for _ in stream]
        print(json.dumps({"tokens_per_second": (tokens - 1) / (times[-1] - times[0])}), flush=True)


if __name__ == "__main__":
    main()
