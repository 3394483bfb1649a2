"""What pages and examples run with: tiny models by the names that pages use, and a cache and a command of their own."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.chat_templates import HERMES
from tests.support.lora_files import weights_of, write_lora
from tests.support.processes import COMMAND, environment, python, run_on_one_core
from tests.support.tiny_models import MODELS, write_tiny_model

# Kept whatever else the machine does: what these tests print as predicted is not looked at, and measuring for each would take long.
_MEASURE = """
import sys
import llama_moe
model = llama_moe.inspect(sys.argv[1])
for repack in (False, True):
    llama_moe.bandwidths(model, devices=[], repack=repack, keep_disturbed=True)
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that pages name. Tiny ones: what they write means nothing, and takes no time."""
    folder = tmp_path_factory.mktemp("models")
    shape = replace(MODELS["qwen3moe"], context_length=4096, chat_template=HERMES)
    model = write_tiny_model(folder / "model.gguf", replace(shape, layers=24))
    small = write_tiny_model(folder / "small.gguf", replace(shape, layers=2))
    adapters = {name: folder / name for name in ("adapter.gguf", "style.gguf")}
    for path in adapters.values():
        write_lora(path, weights_of(model, containing=("attn_q.", "ffn_up_exps.")), architecture=shape.architecture)
    return adapters | {
        "model.gguf": model,
        "small.gguf": small,
        "model-F16.gguf": model,
        "model-Q8_0.gguf": model,
        "model-Q4_K_M.gguf": model,
    }


@pytest.fixture(scope="session")
def variables(tmp_path_factory: pytest.TempPathFactory, demo_path: Path, models: dict[str, Path]) -> dict[str, str]:
    """The environment: a command `llama-moe`, and a cache where a tiny model has the demo model's place and nothing is this user's."""
    home = tmp_path_factory.mktemp("home")
    command = home / "bin" / "llama-moe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    (home / "cache" / "demo").mkdir(parents=True)
    (home / "cache" / "demo" / demo_path.name).symlink_to(models["small.gguf"])
    variables = environment() | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "LLAMA_MOE_CACHE": str(home / "cache"),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "no-token"),
    }
    measured = run_on_one_core(python(_MEASURE, models["model.gguf"]), env=variables)
    assert measured.returncode == 0, measured.stderr
    return variables
