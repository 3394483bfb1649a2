"""Streams greedy text with llama-cpp-python; each line of JSON on stdin, {"prompts", "tokens"}, is answered by one with seconds."""

from __future__ import annotations

import json
import sys
import time

import llama_cpp


def main() -> None:
    """Loads the model named on the command line, then answers until stdin ends."""
    model, threads = sys.argv[1], int(sys.argv[2])
    llm = llama_cpp.Llama(model, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    never = {token: -1e9 for token in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, token)}
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        seconds = []
        for prompt in request["prompts"]:
            stream = llm.create_completion(prompt, max_tokens=request["tokens"], temperature=0, stream=True, logit_bias=never)
            # Tokens without whole characters share a chunk, so chunks are not counted: all tokens are there at the last one.
            times = [time.perf_counter() for _ in stream]
            seconds.append(times[-1] - times[0])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
