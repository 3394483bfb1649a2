"""What we are compared with, each in a process of its own, so that no peer shares threads or memory with what is measured."""

from benchmarks.peers.llama_cpp_python import LlamaCppPython
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.programs import batched_bench_rate, llama_bench_load_seconds, llama_bench_rates

__all__ = ["LlamaCppPython", "LlamaServer", "batched_bench_rate", "llama_bench_load_seconds", "llama_bench_rates"]
