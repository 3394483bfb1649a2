"""Many processes and machines with Ray: batch inference with Ray Data, the server with Ray Serve (extra `ray`).

Example:
    answers = dataset.map_batches(
        LlamaMoe,
        fn_constructor_kwargs={"model": "model.gguf", "sampling": SamplingParams(max_tokens=64)},
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
"""

from __future__ import annotations

from .data import LlamaMoe
from .serve import build_app, deployment

__all__ = ["LlamaMoe", "build_app", "deployment"]
