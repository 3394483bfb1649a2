"""What we are compared with, each in a process of its own, so that no peer shares threads or memory with what is measured."""

from benchmarks.peers.ik_llama_cpp import IK_LLAMA_CPP, MISSING_IK_LLAMA_CPP, IkLlamaCpp, has_ik_llama_cpp
from benchmarks.peers.llama_cpp_python import LlamaCppPython
from benchmarks.peers.llama_server import LlamaServer
from benchmarks.peers.programs import (
    batched_bench_rate,
    int8_peak,
    llama_bench_command,
    llama_bench_load_seconds,
    llama_bench_prompt_and_decode_rates,
    llama_bench_rates,
)

__all__ = [
    "IK_LLAMA_CPP",
    "MISSING_IK_LLAMA_CPP",
    "IkLlamaCpp",
    "LlamaCppPython",
    "LlamaServer",
    "batched_bench_rate",
    "has_ik_llama_cpp",
    "int8_peak",
    "llama_bench_command",
    "llama_bench_load_seconds",
    "llama_bench_prompt_and_decode_rates",
    "llama_bench_rates",
]
