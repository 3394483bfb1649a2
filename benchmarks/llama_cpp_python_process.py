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
    bos = llm.token_bos() if llm.token_bos() >= 0 else 0
    for line in sys.stdin:
        tokens = int(line)
        times = []
        for _ in llm.create_completion([bos], max_tokens=tokens, temperature=0, stream=True, logit_bias={llm.token_eos(): -1e9}):
            times.append(time.perf_counter())
        # The last chunk carries the finish reason and no token.
        count = min(tokens, len(times))
        print(json.dumps({"tokens_per_second": (count - 1) / (times[count - 1] - times[0])}), flush=True)


if __name__ == "__main__":
    main()
