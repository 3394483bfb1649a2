"""`llama-moe quantize` and `llama-moe imatrix` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_moe
from tests.support.full_size_models import write_full_size_model
from tests.support.processes import environment

_TEXT = "The experts of the router are chosen for each token of the text. " * 12


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_moe.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment(),
    )


@pytest.fixture(scope="module")
def source(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def test_quantize_writes_the_file_and_a_table_by_role(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    ran = cli("quantize", source, target, "Q8_0", "--experts", "Q4_0", "--override", r"blk\.0\.ffn_down_exps=Q5_0", "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0].split() == ["role", "before", "after", "bits", "per", "weight", "formats"]
    assert str(target) in ran.stderr
    tensors = {tensor.name: tensor.type for tensor in llama_moe.inspect(target).tensors}
    assert tensors["blk.0.ffn_down_exps.weight"] == "Q5_0"
    assert tensors["blk.1.ffn_down_exps.weight"] == "Q4_0"
    assert tensors["blk.1.attn_q.weight"] == "Q8_0"


def test_a_dry_run_needs_no_target_and_no_weights(tmp_path: Path) -> None:
    source = write_full_size_model(tmp_path / "model.gguf", "DeepSeek-MoE-16B")
    ran = cli("quantize", source, "Q4_K_M", "--experts", "Q2_K", "--attention", "Q6_K", "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert "27.84 GiB" in ran.stdout
    assert "27 tensors get Q4_0 instead of Q2_K: rows of 1408 are no multiple of its blocks." in ran.stdout
    with_target = cli("quantize", source, tmp_path / "q.gguf", "Q4_K_M", "--dry-run", "--json")
    report = llama_moe.quantize(source, None, "Q4_K_M", dry_run=True)
    assert json.loads(with_target.stdout)["file_bytes"] == report.file_bytes
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["Q8_0"], 2, "SRC DST TYPE"),
        (["q.gguf", "Q8_0", "more"], 2, "SRC DST TYPE"),
        (["q.gguf", "Q8_0", "--override", "blk"], 2, "'blk' is not REGEX=TYPE"),
        (["q.gguf", "Q99"], 1, "error: type: 'Q99' is not known; it must be one of F32, F16"),
        (["q.gguf", "Q8_0", "--experts", "Q4_K_M"], 1, "error: experts: 'Q4_K_M' is not a tensor type"),
        (["q.gguf", "IQ2_XXS", "--override", "_exps=IQ2_XXS", "--imatrix", "none.gguf"], 1, "none.gguf"),
    ],
)
def test_a_mistake_is_explained(source: Path, tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    inside = [str(tmp_path / argument) if argument.endswith(".gguf") else argument for argument in arguments]
    ran = cli("quantize", source, *inside)
    assert ran.returncode == status
    assert message in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_importance_matrix_for_quantize(source: Path, tmp_path: Path) -> None:
    text, matrix = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text(_TEXT, encoding="utf-8")
    ran = cli("imatrix", source, "-f", text, "-o", matrix, "--ctx", 64, "--chunks", 2, "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    assert "128 tokens in 2 chunks" in ran.stdout
    ran = cli("quantize", source, tmp_path / "q.gguf", "Q4_0", "--imatrix", matrix, "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    assert llama_moe.inspect(tmp_path / "q.gguf").metadata["quantize.imatrix.dataset"] == "text.txt"
    assert cli("imatrix", source, "-f", tmp_path / "none.txt", "-o", matrix).returncode == 2
    short = cli("imatrix", source, "-f", text, "-o", matrix, "--ctx", 100_000)
    assert short.returncode == 1
    assert "is the least" in short.stderr
