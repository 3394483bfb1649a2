"""Computes random tokens with ik_llama.cpp's library, called through ctypes; each line of JSON on stdin is answered by one on stdout.

    ik_llama_cpp_process.py LIBRARY MODEL THREADS CONTEXT REPACK

loads the model, with its weights repacked at run time if REPACK is 1, and answers {"load_seconds", "peak_bytes"}. Then {"prompt": N}
computes N tokens in one call and {"tokens": N} N tokens one after the other, each after an empty context; the answer is {"seconds"}.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from pathlib import Path

_INT, _UINT, _BOOL, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_uint32, ctypes.c_bool, ctypes.c_float, ctypes.c_void_p
_F16 = 1
_BATCH, _MICRO_BATCH = 2048, 512


# The structures of llama.h of ik_llama_cpp_python 0.1.5, passed by value. Enumerations are ints; a group of names is fields of one type.


class ModelParams(ctypes.Structure):
    """llama_model_params."""

    _fields_ = [
        ("devices", _POINTER),
        *((name, _INT) for name in ("n_gpu_layers", "mla", "split_mode", "main_gpu", "max_gpu", "ncmoe", "type_k", "type_v")),
        ("max_ctx_size", _UINT),
        *((name, _INT) for name in ("n_seq_max", "n_ubatch", "amb", "fit_margin")),
        ("fit", _BOOL),
        ("worst_graph_tokens", _INT),
        *((name, _INT) for name in ("type_k_first", "type_k_last", "type_v_first", "type_v_last")),
        *((name, _INT) for name in ("n_k_first", "n_k_last", "n_v_first", "n_v_last")),
        *((name, _POINTER) for name in ("tensor_split", "rpc_servers", "progress_callback", "progress_callback_user_data")),
        *((name, _POINTER) for name in ("kv_overrides", "tensor_buft_overrides")),
        *((name, _BOOL) for name in ("vocab_only", "use_mmap", "use_mlock", "check_tensors", "repack_tensors", "use_thp")),
        *((name, _BOOL) for name in ("validate_quants", "merge_qkv", "merge_up_gate_exps", "mtp", "dry_run", "flash_attn")),
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        *((name, _UINT) for name in ("seed", "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch")),
        *((name, _INT) for name in ("max_extra_alloc", "worst_case_tokens", "rope_scaling_type", "pooling_type", "attention_type")),
        *((name, _FLOAT) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, _FLOAT) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", _UINT),
        ("defrag_thold", _FLOAT),
        *((name, _POINTER) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, _INT) for name in ("type_k", "type_v", "type_reduce", "type_k_first", "type_k_last", "type_v_first", "type_v_last")),
        *((name, _INT) for name in ("n_k_first", "n_k_last", "n_v_first", "n_v_last")),
        *((name, _BOOL) for name in ("logits_all", "embeddings", "offload_kqv", "flash_attn")),
        *((name, _INT) for name in ("mla_attn", "attn_max_batch")),
        *((name, _BOOL) for name in ("fused_moe_up_gate", "grouped_expert_routing", "fused_up_gate", "fused_mmad", "rope_cache")),
        ("graph_reuse", _BOOL),
        ("min_experts", _INT),
        ("thresh_experts", _FLOAT),
        *((name, _BOOL) for name in ("only_active_experts", "k_cache_hadamard", "v_cache_hadamard", "split_mode_graph_scheduling")),
        *((name, _BOOL) for name in ("scheduler_async", "mtp")),
        ("mtp_op_type", _INT),
        *((name, _POINTER) for name in ("abort_callback", "abort_callback_data", "offload_policy", "cuda_params")),
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", _INT),
        *((name, _POINTER) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
        *((name, _INT) for name in ("all_pos_0", "all_pos_1", "all_seq_id")),
    ]


def open_library(path: str) -> ctypes.CDLL:
    """Opens the library and says what its functions take.

    Raises:
        RuntimeError: the structures are not laid out as this file says, which what they hold by default tells.
    """
    library = ctypes.CDLL(path)
    signatures: dict[str, tuple[object, list[type]]] = {
        "llama_backend_init": (None, []),
        "llama_log_set": (None, [_POINTER, _POINTER]),
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, ModelParams]),
        "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
        "llama_n_vocab": (_INT, [_POINTER]),
        "llama_kv_cache_clear": (None, [_POINTER]),
        "llama_batch_get_one": (Batch, [_POINTER, _INT, _INT, _INT]),
        "llama_decode": (_INT, [_POINTER, Batch]),
        "llama_get_logits_ith": (_POINTER, [_POINTER, _INT]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    model, context = library.llama_model_default_params(), library.llama_context_default_params()
    found = [
        *(model.type_v, model.n_ubatch, model.n_v_last, model.use_mmap, model.repack_tensors, model.flash_attn),
        *(context.n_ctx, context.n_ubatch, context.yarn_beta_slow, context.type_v, context.n_v_last, context.offload_kqv),
        *(context.mla_attn, context.fused_moe_up_gate, context.graph_reuse, context.min_experts, context.cuda_params),
    ]
    if found != [_F16, 512, -1, True, False, True, 512, 512, -1.0, _F16, -1, True, 3, True, True, -1, None]:
        raise RuntimeError(f"llama.h of this ik_llama.cpp differs from the one this file is made for: {found}")
    return library


class Computation:
    """A loaded model and a context of one sequence."""

    def __init__(self, library: ctypes.CDLL, model: str, *, threads: int, context_size: int, repack: bool) -> None:
        self._library = library
        parameters = library.llama_model_default_params()
        parameters.repack_tensors = repack
        parameters.use_mmap = not repack  # as its programs do: pages of the file are not to be written to
        self._model = library.llama_model_load_from_file(model.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"ik_llama.cpp cannot load {model}")
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context_size, _BATCH, _MICRO_BATCH
        options.n_threads = options.n_threads_batch = threads
        self._context = library.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("ik_llama.cpp cannot make a context")
        self._tokens = range(library.llama_n_vocab(self._model))

    def _decode(self, count: int, position: int) -> None:
        tokens = (_INT * count)(*random.choices(self._tokens, k=count))
        # Its batch asks for the logits of the last token alone.
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, count, position, 0)):
            raise RuntimeError("llama_decode failed")
        if not self._library.llama_get_logits_ith(self._context, -1):
            raise RuntimeError("there are no logits")

    def prompt_seconds(self, count: int) -> float:
        """Seconds that a prompt takes."""
        self._library.llama_kv_cache_clear(self._context)
        begin = time.perf_counter()
        self._decode(count, 0)
        return time.perf_counter() - begin

    def token_seconds(self, count: int) -> float:
        """Seconds that tokens one after the other take."""
        self._library.llama_kv_cache_clear(self._context)
        begin = time.perf_counter()
        for position in range(count):
            self._decode(1, position)
        return time.perf_counter() - begin


def peak_bytes() -> int:
    """The most memory that this process had at once, pages of mapped files among it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Loads the model named on the command line, then answers until stdin ends."""
    path, model, threads, context_size, repack = sys.argv[1:]
    library = open_library(path)
    silent = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)(lambda *_: None)
    library.llama_log_set(ctypes.cast(silent, _POINTER), None)
    library.llama_backend_init()
    before = peak_bytes()
    begin = time.perf_counter()
    computation = Computation(library, model, threads=int(threads), context_size=int(context_size), repack=repack == "1")
    _answer({"load_seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes() - before})
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            _answer({"seconds": computation.prompt_seconds(request["prompt"])})
        else:
            _answer({"seconds": computation.token_seconds(request["tokens"])})


def _answer(answer: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
