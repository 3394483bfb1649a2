"""What this build is made of."""

from __future__ import annotations

from . import _core


def build_info() -> dict[str, str]:
    """Facts for a bug report.

    Returns:
        "version" of llama_moe, "llama_cpp_commit", "llama_cpp_version", "compiler", "backends", "linkage" (how they are there: "static", in
        the module, or "dynamic", loaded as libraries), "cpu_variant" (of the loaded CPU backend, such as "haswell"; empty for a static
        one), "cpu_features" (the instruction sets that it uses) and "expert_kernels" (those of llama_moe's own kernels).
    """
    return _core.build_info()
