"""Which files are models: all of those in the folders, and nothing outside of them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from llama_moe.server import ServerSettings
from llama_moe.server.discovery import find_models


def gguf(path: Path, size: int = 100) -> Path:
    """A file that begins as a model does; no more of it is looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF".ljust(size, b"\0"))
    return path


def names(*folders: Path) -> list[str]:
    return list(find_models(ServerSettings(model_dirs=folders)))


def test_files_are_named_by_their_place_in_the_folder(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.GGUF", "sub/deep/c.gguf", "sub/a.gguf"):
        gguf(tmp_path / name)
    assert names(tmp_path) == ["a", "b", "sub/a", "sub/deep/c"]
    model = find_models(ServerSettings(model_dirs=[tmp_path]))["sub/deep/c"]
    assert model.path == tmp_path / "sub/deep/c.gguf"
    assert model.size_bytes == 100
    assert model.created == int(model.path.stat().st_mtime)


def test_what_is_no_model_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("text")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    gguf(tmp_path / "other.bin")
    gguf(tmp_path / ".hidden" / "x.gguf")
    gguf(tmp_path / "mmproj-model.gguf")
    gguf(tmp_path / "model.imatrix.gguf")
    gguf(tmp_path / "imatrixes.gguf")
    assert names(tmp_path) == ["imatrixes"]


def test_links_are_followed_within_the_folders_only(tmp_path: Path) -> None:
    inside, other, outside = tmp_path / "models", tmp_path / "other", tmp_path / "outside"
    gguf(inside / "real.gguf")
    gguf(other / "second.gguf")
    secret = gguf(outside / "secret.gguf")
    (inside / "alias.gguf").symlink_to("real.gguf")
    (inside / "to-other.gguf").symlink_to(other / "second.gguf")
    (inside / "escape.gguf").symlink_to(secret)
    (inside / "up.gguf").symlink_to("../outside/secret.gguf")
    (inside / "twice.gguf").symlink_to("escape.gguf")
    (inside / "folder").symlink_to(outside)
    (inside / "dangling.gguf").symlink_to("nowhere.gguf")
    (inside / "loop.gguf").symlink_to("loop.gguf")
    assert names(inside) == ["alias", "real"]
    assert names(inside, other) == ["alias", "real", "to-other", "second"]
    # A folder that is itself a link is what the user named.
    (tmp_path / "link").symlink_to(inside)
    assert names(tmp_path / "link") == ["alias", "real"]


def test_a_split_model_is_one_and_complete(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        gguf(tmp_path / f"big-{part:05}-of-00003.gguf")
    gguf(tmp_path / "lacks-00001-of-00002.gguf")
    gguf(tmp_path / "late-00002-of-00002.gguf")
    secret = gguf(tmp_path.parent / "secret.gguf")
    gguf(tmp_path / "sly-00001-of-00002.gguf")
    (tmp_path / "sly-00002-of-00002.gguf").symlink_to(secret)
    found = find_models(ServerSettings(model_dirs=[tmp_path]))
    assert list(found) == ["big"]
    assert found["big"].path.name == "big-00001-of-00003.gguf"
    assert found["big"].size_bytes == 300


def test_named_files_come_first_wherever_they_are(tmp_path: Path) -> None:
    outside = gguf(tmp_path / "a" / "z.gguf")
    gguf(tmp_path / "models" / "b.gguf")
    found = find_models(ServerSettings(models=[outside], model_dirs=[tmp_path / "models"]))
    assert list(found) == ["z", "b"]


def test_of_two_with_one_name_the_first_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = gguf(tmp_path / "1" / "a.gguf"), gguf(tmp_path / "2" / "a.gguf")
    with caplog.at_level(logging.WARNING, "llama_moe.server"):
        found = find_models(ServerSettings(model_dirs=[first.parent, second.parent]))
    assert found["a"].path == first
    assert str(second) in caplog.text


def test_what_is_named_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf"):
        find_models(ServerSettings(models=[tmp_path / "gone.gguf"]))
    with pytest.raises(FileNotFoundError, match="gone"):
        find_models(ServerSettings(model_dirs=[tmp_path / "gone"]))
