"""Plug-in packages as pip would have installed them, with a description of one's own and no library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_moe

COMMIT = llama_moe.build_info()["llama_cpp_commit"]
# Every system that has Python has it.
PRESENT = {"library": "libc.so.6", "name": "the C library", "advice": "-"}


def write_plugin(folder: Path, **description: Any) -> Path:
    """An installed package "llama-moe-fake" with this plugin.json; returns the folder to put on the path."""
    metadata = folder / "llama_moe_fake-1.2.dist-info"
    package = folder / "llama_moe_fake"
    metadata.mkdir()
    package.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-moe-fake\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text("[llama_moe.backends]\nfake = llama_moe_fake\n")
    (package / "__init__.py").touch()
    defaults = {"llama_cpp_commit": COMMIT, "library": "libfake.so", "needs": PRESENT, "preload": ["nothing/libnothing.so"]}
    (package / "plugin.json").write_text(json.dumps(defaults | description))
    return folder
