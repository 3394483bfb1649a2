"""Headers of models on a web server: the header alone is fetched, and a server that misbehaves is a clear error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import pytest

import llama_moe
from llama_moe import remote
from llama_moe.errors import ModelLoadError
from llama_moe.remote import local_header, remote_url
from tests.support.gguf_files import edited_copy, sparse_copy
from tests.support.http_files import FileServer, Request

if TYPE_CHECKING:
    from tests.support.gguf_files import Value

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_token_and_no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no tokens here"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with FileServer(folder) as server:
        yield server


@pytest.fixture
def large(tiny_model: Callable[[str], Path], folder: Path) -> Path:
    """A model of more than 2 GiB, all holes, with a header of more than 3 MiB."""
    words: Value = (["x" * 600] * 6000, gguf.GGUFValueType.ARRAY)
    target = sparse_copy(tiny_model("qwen3moe"), folder / "large.gguf", factor=4096, metadata={"test.words": words})
    assert target.stat().st_size > 1 << 30
    return target


def test_the_header_alone_is_fetched(server: FileServer, large: Path) -> None:
    here = llama_moe.inspect(large)
    there = llama_moe.inspect(f"{server.url}/large.gguf")
    assert there.path == f"{server.url}/large.gguf"
    assert there.tensors == here.tensors
    assert there.metadata == here.metadata
    assert (there.size_bytes, there.expert_count, there.experts_used) == (here.size_bytes, here.expert_count, here.experts_used)
    # A header of 3.5 MiB: one, two and four MiB, and nothing twice.
    assert len(server.requests) == 3
    assert server.sent == 4 * MIB


def test_a_copy_of_the_header_is_as_large_as_the_file_and_takes_no_room(server: FileServer, large: Path) -> None:
    with local_header(f"{server.url}/large.gguf") as header:
        assert header.name == "large.gguf"
        assert header.stat().st_size == large.stat().st_size
        assert header.stat().st_blocks * 512 < 8 * MIB
    assert not header.parent.exists()


def test_a_small_file_is_read_with_one_request(server: FileServer, folder: Path, tiny_model: Callable[[str], Path]) -> None:
    (folder / "a b.gguf").write_bytes(tiny_model("llama").read_bytes())
    assert llama_moe.inspect(f"{server.url}/a%20b.gguf?download=true").architecture == "llama"
    assert server.requests == ["/a%20b.gguf?download=true"]


def test_a_file_of_this_machine_passes_through(server: FileServer, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny_model("llama")
    for given in (path, str(path)):
        with local_header(given) as header:
            assert header == path
    with local_header(tmp_path / "absent.gguf") as header:  # who reads it says that it is not there
        assert header == tmp_path / "absent.gguf"
    assert server.requests == []
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        llama_moe.inspect(str(tmp_path / "absent.gguf"))


# ---- split models


@pytest.fixture
def split(tiny_model: Callable[[str], Path], folder: Path) -> Path:
    """The first of two parts: the experts are in the second."""
    source = tiny_model("qwen3moe")
    names = [tensor.name for tensor in gguf.GGUFReader(source).tensors]
    experts = [name for name in names if "_exps" in name]

    def counts(number: int) -> dict[str, Value]:
        kind = gguf.GGUFValueType
        return {"split.no": (number, kind.UINT16), "split.count": (2, kind.UINT16), "split.tensors.count": (len(names), kind.INT32)}

    first = edited_copy(source, folder / "m-00001-of-00002.gguf", metadata=counts(0), without_tensors=experts)
    edited_copy(source, folder / "m-00002-of-00002.gguf", metadata=counts(1), without_tensors=[n for n in names if n not in experts])
    return first


def test_all_parts_of_a_split_model_are_read(server: FileServer, split: Path) -> None:
    there = llama_moe.inspect(f"{server.url}/{split.name}?a=b")
    assert there.tensors == llama_moe.inspect(split).tensors
    assert any(tensor.role == "experts" for tensor in there.tensors)
    assert server.requests == ["/m-00001-of-00002.gguf?a=b", "/m-00002-of-00002.gguf?a=b"]


def test_a_missing_part_is_named(server: FileServer, split: Path) -> None:
    split.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002\.gguf"):
        llama_moe.inspect(f"{server.url}/{split.name}")


def test_a_later_part_alone_is_an_error_that_names_the_url(server: FileServer, split: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"{server.url}/m-00002-of-00002.gguf.*first file"):
        llama_moe.inspect(f"{server.url}/m-00002-of-00002.gguf")


# ---- the Hugging Face hub


def test_a_reference_is_of_the_hub_unless_there_is_such_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert remote_url("owner/repo/file.gguf") == "https://huggingface.co/owner/repo/resolve/main/file.gguf"
    assert remote_url("owner/repo.v1/a folder/file.gguf") == "https://huggingface.co/owner/repo.v1/resolve/main/a%20folder/file.gguf"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/")
    assert remote_url("owner/repo/file.gguf") == "http://mirror.example/owner/repo/resolve/main/file.gguf"
    for path in ("file.gguf", "repo/file.gguf", "/owner/repo/file.gguf", "./owner/repo/file.gguf", "owner/../repo/file.gguf", "a/b/c.txt"):
        assert remote_url(path) is None
    (tmp_path / "owner" / "repo").mkdir(parents=True)
    (tmp_path / "owner" / "repo" / "file.gguf").touch()
    assert remote_url("owner/repo/file.gguf") is None
    assert remote_url(Path("other/repo/file.gguf")) is None


@pytest.mark.parametrize(("status", "error"), [(404, FileNotFoundError), (401, ModelLoadError)])
def test_a_mistyped_file_is_told_of_as_a_file_too(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
) -> None:
    def refuse(request: Request) -> bool:
        request.reply(status)
        return True

    server.misbehave = refuse
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    with pytest.raises(error, match=rf"no file 'models/foo/bar\.gguf' here, and on the hub: .*{status}"):
        llama_moe.inspect("models/foo/bar.gguf")


def test_a_token_goes_to_the_hub_and_to_nobody_else(
    server: FileServer, folder: Path, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "blob").write_bytes(tiny_model("llama").read_bytes())
    with FileServer(tmp_path / "store") as store:

        def to_the_store(request: Request) -> bool:
            if request.path == "/owner/repo/resolve/main/m.gguf":
                request.reply(307, headers={"Location": "/renamed/resolve/main/m.gguf"})
            else:
                request.reply(302, headers={"Location": f"{store.url}/blob"})
            return True

        server.misbehave = to_the_store
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert llama_moe.inspect("owner/repo/m.gguf").architecture == "llama"
        assert server.tokens == ["Bearer hf_secret", "Bearer hf_secret"]
        assert store.tokens == [None]
        assert store.requests == ["/blob"]
        llama_moe.inspect(f"{store.url}/blob")
        assert store.tokens == [None, None]


def test_a_token_is_found_where_the_tools_of_the_hub_keep_it(
    server: FileServer, folder: Path, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "o/r/resolve/main").mkdir(parents=True)
    (folder / "o/r/resolve/main/m.gguf").write_bytes(tiny_model("llama").read_bytes())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("hf_from_file\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    llama_moe.inspect("o/r/m.gguf")
    assert server.tokens == ["Bearer hf_from_file"]


# ---- servers that misbehave


def reads(server: FileServer, message: str, error: type[Exception] = ModelLoadError, *, timeout: float = 30) -> None:
    with pytest.raises(error, match=message), local_header(f"{server.url}/large.gguf", timeout=timeout):
        pass


def test_a_server_without_ranges_is_not_asked_for_the_whole_file(server: FileServer, large: Path) -> None:
    def all_of_it(request: Request) -> bool:
        request.reply(200, b"GGUF", announced=large.stat().st_size)
        return True

    server.misbehave = all_of_it
    reads(server, "does not support range requests")
    assert server.sent == 4


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, FileNotFoundError, r"no such file: .*/large\.gguf"),
        (401, ModelLoadError, "set HF_TOKEN"),
        (403, ModelLoadError, "set HF_TOKEN"),
        (400, ModelLoadError, "status 400"),
    ],
)
def test_a_refusal_is_not_tried_again(server: FileServer, status: int, error: type[Exception], message: str) -> None:
    def refuse(request: Request) -> bool:
        request.reply(status)
        return True

    server.misbehave = refuse
    reads(server, message, error)
    assert len(server.requests) == 1


def test_a_server_that_is_busy_is_asked_again(server: FileServer, large: Path) -> None:
    def busy(request: Request) -> bool:
        if len(server.requests) in (1, 2):
            request.reply(503)
            return True
        return False

    server.misbehave = busy
    with local_header(f"{server.url}/large.gguf") as header:
        assert llama_moe.inspect(header).architecture == "qwen3moe"


def test_a_server_that_stays_busy_is_an_error(server: FileServer) -> None:
    def busy(request: Request) -> bool:
        request.reply(503)
        return True

    server.misbehave = busy
    reads(server, "in 4 attempts: status 503")
    assert len(server.requests) == 4


def test_a_dropped_connection_goes_on_where_it_ended(server: FileServer, large: Path) -> None:
    asked: list[str] = []

    def drop(request: Request) -> bool:
        asked.append(request.headers["Range"])
        if len(asked) != 1:
            return False
        with large.open("rb") as file:
            piece = file.read(1000)
        request.reply(206, piece, {"Content-Range": f"bytes 0-{MIB - 1}/{large.stat().st_size}"}, announced=MIB)
        request.close_connection = True
        return True

    server.misbehave = drop
    with local_header(f"{server.url}/large.gguf") as header:
        assert llama_moe.inspect(header).architecture == "qwen3moe"
    assert asked[:2] == [f"bytes=0-{MIB - 1}", f"bytes=1000-{MIB - 1}"]
    assert server.sent == 4 * MIB


def test_a_server_that_says_nothing_is_given_up(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_ATTEMPTS", 2)
    over = threading.Event()

    def silent(request: Request) -> bool:
        return over.wait(30)

    server.misbehave = silent
    try:
        reads(server, "in 2 attempts: .*timed out", timeout=0.1)
    finally:
        over.set()


def test_nobody_listening_is_an_error(folder: Path) -> None:
    with FileServer(folder) as server:
        url = f"{server.url}/large.gguf"
    with pytest.raises(ModelLoadError, match="refused"), local_header(url):
        pass


def test_a_file_that_changes_meanwhile_is_an_error(server: FileServer, large: Path) -> None:
    def grow(request: Request) -> bool:
        os.truncate(large, large.stat().st_size + 1)
        return False

    server.misbehave = grow
    reads(server, "changed while it was read")


@pytest.mark.parametrize("content_range", ["", "bytes 1-9/10", "bytes 0-9/*", "bytes */10", "bytes 0-9/99999999999999999999"])
def test_another_range_than_asked_for_is_an_error(server: FileServer, content_range: str) -> None:
    def other(request: Request) -> bool:
        request.reply(206, b"GGUF", {"Content-Range": content_range} if content_range else {})
        return True

    server.misbehave = other
    reads(server, "answered with range")


def test_redirects_in_a_circle_or_elsewhere_are_errors(server: FileServer) -> None:
    def circle(request: Request) -> bool:
        request.reply(302, headers={"Location": request.path})
        return True

    targets = iter(["ftp://127.0.0.1/m.gguf", "file:///etc/hostname"])

    def elsewhere(request: Request) -> bool:
        request.reply(302, headers={"Location": next(targets)})
        return True

    server.misbehave = circle
    reads(server, "status 302")
    server.misbehave = elsewhere
    reads(server, "not HTTP")
    reads(server, "is not allowed")


@pytest.mark.parametrize("url", ["http://", "https:///m.gguf", "http://127.0.0.1:port/m.gguf", "http://a b/m.gguf", "http://[::1/m.gguf"])
def test_a_url_that_is_none_is_an_error(url: str) -> None:
    with pytest.raises(ModelLoadError, match=r"URL|cannot read"), local_header(url):
        pass


# ---- files that are not what they should be


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return HEAD + struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not a model</html>", "does not start with the magic"),
        (b"GG", "truncated"),
        (b"", "is empty"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648"),
        (HEAD, "truncated: its header goes beyond byte 24"),
        (key(b"a", 99, b""), "a value of type 99"),
        (key(b"a", 9, struct.pack("<IQ", 9, 1)), "an array of arrays"),
        (key(b"a", 9, struct.pack("<IQ", 0, 1 << 62)), "a header of more than 256"),
        (HEAD + struct.pack("<Q", (1 << 64) - 1), "a header of more than 256"),
    ],
)
def test_what_is_no_model_is_refused(server: FileServer, folder: Path, content: bytes, message: str) -> None:
    (folder / "large.gguf").write_bytes(content)
    reads(server, message)


def test_a_truncated_model_is_told_of_by_its_url(server: FileServer, folder: Path, tiny_model: Callable[[str], Path]) -> None:
    (folder / "cut.gguf").write_bytes(tiny_model("llama").read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=rf"'{server.url}/cut\.gguf' is truncated: tensor"):
        llama_moe.inspect(f"{server.url}/cut.gguf")


# ---- around it


def test_the_command_takes_a_url(server: FileServer, folder: Path, tiny_model: Callable[[str], Path]) -> None:
    (folder / "m.gguf").write_bytes(tiny_model("qwen3moe").read_bytes())
    command = [sys.executable, "-m", "llama_moe.cli", "inspect", f"{server.url}/m.gguf", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["path"] == f"{server.url}/m.gguf"
    command[-2] = f"{server.url}/absent.gguf"
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "no such file" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_importing_the_package_imports_no_http() -> None:
    code = "import sys, llama_moe; sys.exit('urllib.request' in sys.modules or 'http.client' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
