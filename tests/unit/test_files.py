"""Files that are written whole, or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_moe._files import check_writable, written_whole


def write(path: Path) -> None:
    with written_whole(path) as partial:
        partial.write_text("new", encoding="utf-8")


both = pytest.mark.parametrize("use", [write, check_writable])


@both
def test_errors_name_the_file_and_not_its_partial_one(tmp_path: Path, use: Callable[[Path], None]) -> None:
    (tmp_path / "file").touch()
    for target, kind in ((tmp_path / "none" / "x", FileNotFoundError), (tmp_path / "file" / "x", NotADirectoryError)):
        with pytest.raises(kind) as caught:
            use(target)
        assert caught.value.filename == str(target)
        assert str(target) in str(caught.value)
        assert "partial" not in str(caught.value)


def test_errors_that_tell_of_the_partial_file_in_words_name_the_file_too(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write") as caught, written_whole(tmp_path / "x") as partial:
        raise OSError(28, f"cannot write '{partial}': no room")
    assert str(caught.value) == f"[Errno 28] cannot write '{tmp_path / 'x'}': no room"
    with pytest.raises(FileNotFoundError) as other, written_whole(tmp_path / "x"):
        (tmp_path / "another").read_bytes()
    assert other.value.filename == str(tmp_path / "another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_file_is_written(tmp_path: Path, dangling: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    if not dangling:
        target.write_text("old", encoding="utf-8")
    link.symlink_to(Path("elsewhere") / "file")
    check_writable(link)
    write(link)
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == "new"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["elsewhere", "file", "link"]


@both
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, use: Callable[[Path], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="not a regular file") as caught:
            use(tmp_path / name)
        assert caught.value.filename == str(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="folder"):
        use(tmp_path / "folder")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "link", "pipe"]


@both
def test_a_file_that_is_there_is_kept_until_the_new_one_is_whole(tmp_path: Path, use: Callable[[Path], None]) -> None:
    (tmp_path / "x").write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError), written_whole(tmp_path / "x") as partial, partial.open("w", encoding="ascii") as file:
        file.writelines(["half\n", "é"])
    assert (tmp_path / "x").read_text(encoding="utf-8") == "old"
    use(tmp_path / "x")
    assert (tmp_path / "x").read_text(encoding="utf-8") == ("new" if use is write else "old")
    assert len(list(tmp_path.iterdir())) == 1
