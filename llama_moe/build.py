"""What this build is made of."""

from __future__ import annotations

from . import _core


def build_info() -> dict[str, str]:
    """Facts for a bug report: "version" of llama_moe, "llama_cpp_commit", "compiler", "backends" and "cpu_features"."""
    return _core.build_info()
