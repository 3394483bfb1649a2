"""Fetching models from a hub: a real HTTP server on this machine."""

from __future__ import annotations

import errno
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import llama_moe
from llama_moe import Model
from llama_moe.errors import DownloadError, InvalidOptionError
from llama_moe.hub import local_model, pull
from tests.support.fake_hub import COMMIT, FakeHub
from tests.support.http_files import Request
from tests.support.processes import COMMAND, Program, cli
from tests.support.terminal import Terminal
from tests.support.waiting import eventually

REPO = "owner/model-GGUF"
PARTS = [f"Q8_0/m-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one repository of some models, and an empty cache."""
    root = tmp_path / "hub" / REPO
    for name in ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-Q2_K.gguf", "mmproj-Q2_K.gguf", "README.md", *PARTS]:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 20_000)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is lost at most when a transfer ends early
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # for commands
    with FakeHub(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def content(hub: FakeHub, name: str) -> bytes:
    return (hub.folder / REPO / name).read_bytes()


def unfinished(folder: Path) -> list[Path]:
    return [found for found in folder.rglob("*") if found.suffix in {".incomplete", ".partial"}]


@pytest.mark.parametrize("wanted", ["m-Q4_K_M.gguf", "Q4_K_M", "q4_k_m", "*Q4_K_M*"])
def test_a_file_is_named_by_its_name_a_pattern_or_its_format(hub: FakeHub, wanted: str) -> None:
    path = pull(REPO, wanted)
    assert path.name == "m-Q4_K_M.gguf"
    assert path.read_bytes() == content(hub, path.name)


def test_it_is_where_the_hugging_face_tools_find_it(hub: FakeHub) -> None:
    from huggingface_hub import try_to_load_from_cache

    path = pull(REPO, "Q4_K_M")
    assert try_to_load_from_cache(REPO, "m-Q4_K_M.gguf") == str(path)
    assert try_to_load_from_cache(REPO, "m-Q4_K_M.gguf", revision=COMMIT) == str(path)
    assert not unfinished(Path(constants.HF_HUB_CACHE))


def test_what_is_there_is_not_sent_again(hub: FakeHub) -> None:
    first = pull(REPO, "Q4_K_M")
    hub.sent = 0
    assert pull(REPO, "Q4_K_M") == first
    assert hub.sent < 10_000  # the list of files


def test_all_files_of_a_split_model_are_fetched(hub: FakeHub) -> None:
    seen: list[tuple[int, int]] = []
    path = pull(REPO, PARTS[1], on_progress=lambda done, total: seen.append((done, total)))
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    for name in PARTS:
        assert path.with_name(Path(name).name).read_bytes() == content(hub, name)
    total = sum(len(content(hub, name)) for name in PARTS)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_a_split_model_that_lacks_a_file_is_not_offered(hub: FakeHub) -> None:
    (hub.folder / REPO / PARTS[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"no file 'Q8_0'; its GGUF files are m-Q2_K\.gguf"):
        pull(REPO, "Q8_0")


def test_it_can_go_into_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    path = pull(REPO, "Q8_0", folder=tmp_path / "models")
    assert path == tmp_path / "models" / PARTS[0]
    assert sorted(found.name for found in (tmp_path / "models").rglob("*") if found.is_file()) == [Path(name).name for name in PARTS]
    hub.sent = 0
    assert pull(REPO, "Q8_0", folder=tmp_path / "models") == path
    assert hub.sent < 10_000
    path.write_bytes(b"something else")
    with pytest.raises(InvalidOptionError, match=r"is there and has 14 bytes, not the \d+ of the hub's"):
        pull(REPO, "Q8_0", folder=tmp_path / "models")
    assert path.read_bytes() == b"something else"


# ---- interruptions


class StopError(Exception):
    pass


@pytest.mark.parametrize("in_folder", [False, True])
def test_an_interrupted_download_goes_on_where_it_ended(hub: FakeHub, tmp_path: Path, in_folder: bool) -> None:
    size = len(content(hub, "m-Q4_K_M.gguf"))
    folder = tmp_path / "models" if in_folder else None

    def half_of_it(request: Request) -> bool:
        if request.command == "HEAD" or "/resolve/" not in request.path:
            return False
        request.reply(200, content(hub, "m-Q4_K_M.gguf")[: size // 2], announced=size)
        return True

    def stop(done: int, total: int) -> None:
        if done == size // 2:
            raise StopError

    hub.misbehave = half_of_it
    with pytest.raises(StopError):
        pull(REPO, "Q4_K_M", folder=folder, on_progress=stop)
    place = folder or Path(constants.HF_HUB_CACHE)
    (partial,) = unfinished(place)
    assert not list(place.rglob("m-Q4_K_M.gguf"))
    kept = partial.stat().st_size
    hub.misbehave, hub.sent = None, 0
    seen: list[tuple[int, int]] = []
    path = pull(REPO, "Q4_K_M", folder=folder, on_progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == content(hub, "m-Q4_K_M.gguf")
    assert seen[0] == (kept, size)
    assert hub.sent < size - kept + 10_000
    assert not unfinished(place)


def test_ctrl_c_keeps_what_came(hub: FakeHub, tmp_path: Path) -> None:
    size = 25_000_000  # of which the library hands on 10 MB at a time
    whole = b"0123456789" * (size // 10)
    (hub.folder / REPO / "large.gguf").write_bytes(whole)
    released = threading.Event()

    def stall(request: Request) -> bool:
        if request.command == "HEAD" or "/resolve/" not in request.path:
            return False
        request.reply(200, whole[: size // 2], announced=size)
        released.wait(60)
        return True

    hub.misbehave = stall
    cache = Path(constants.HF_HUB_CACHE)
    with Program([*COMMAND, "pull", REPO, "large.gguf"]) as program:
        assert eventually(lambda: any(found.stat().st_size > 9_000_000 for found in unfinished(cache)) or program.ended)
        program.interrupt()
        status, out, errors = program.finish()
        released.set()
    assert (status, out) == (130, ""), errors
    hub.misbehave, hub.sent = None, 0
    pulled = cli("pull", REPO, "large.gguf")
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()).read_bytes() == whole
    assert hub.sent < 15_010_000


def test_a_connection_that_drops_is_taken_up_again(hub: FakeHub) -> None:
    size = len(content(hub, "m-Q4_K_M.gguf"))
    dropped: list[str] = []

    def drop_once(request: Request) -> bool:
        if request.command == "HEAD" or "/resolve/" not in request.path or dropped:
            return False
        dropped.append(request.path)
        request.reply(200, content(hub, "m-Q4_K_M.gguf")[: size // 2], announced=size)
        return True

    hub.misbehave = drop_once
    assert pull(REPO, "Q4_K_M").read_bytes() == content(hub, "m-Q4_K_M.gguf")
    assert dropped


def test_what_comes_damaged_gets_no_name(hub: FakeHub) -> None:
    hub.wrong_hashes.add("m-Q4_K_M.gguf")
    with pytest.raises(
        DownloadError, match=r"'m-Q4_K_M\.gguf' came damaged: its SHA-256 is [0-9a-f]{64}, the hub says [0-9a-f]{64}; try again"
    ):
        pull(REPO, "Q4_K_M")
    cache = Path(constants.HF_HUB_CACHE)
    assert not unfinished(cache)
    assert not list(cache.rglob("m-Q4_K_M.gguf"))


def test_a_disk_that_is_too_small_is_said_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil's
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(1 << 30, (1 << 30) - 1000, 1000))
    with pytest.raises(OSError, match=r"the disk is too small: 1\.8 MiB to download, 1000 B free") as caught:
        pull(REPO, "Q8_0")
    assert caught.value.errno == errno.ENOSPC
    assert not [path for path in hub.requests if re.search(r"/resolve/.*gguf", path) and hub.sent > 10_000]


# ---- what is not there


def test_a_missing_repository_revision_or_file_is_named(hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"the hub has no repository 'owner/other'; if it is private, set HF_TOKEN"):
        pull("owner/other", "Q4_K_M")
    with pytest.raises(FileNotFoundError, match=r"repository 'owner/model-GGUF' has no revision 'v9'"):
        pull(REPO, "Q4_K_M", revision="v9")
    with pytest.raises(
        FileNotFoundError, match=r"has no file 'Q6_K'; its GGUF files are .*m-Q2_K\.gguf, m-Q4_K_M\.gguf, m-Q4_K_S\.gguf, mmproj"
    ):
        pull(REPO, "Q6_K")
    (hub.folder / "owner" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="repository 'owner/empty' has no GGUF file"):
        pull("owner/empty")


def test_a_choice_is_not_guessed(hub: FakeHub) -> None:
    with pytest.raises(
        InvalidOptionError, match=r"2 models of 'owner/model-GGUF' match '\*Q4\*'; give one: m-Q4_K_M\.gguf, m-Q4_K_S\.gguf"
    ):
        pull(REPO, "*Q4*")
    with pytest.raises(InvalidOptionError, match=r"4 models of 'owner/model-GGUF' match; give one: Q8_0/"):
        pull(REPO)
    assert pull(REPO, "Q2_K").name == "m-Q2_K.gguf"  # what goes with a vision model is no model


@pytest.mark.parametrize("repo", ["model", "owner/", "https://example.org/owner/model", "../owner/model", "owner/model/file.bin"])
def test_what_is_no_repository_is_refused(hub: FakeHub, repo: str) -> None:
    with pytest.raises(InvalidOptionError, match="is not a repository of the hub; expected OWNER/REPOSITORY"):
        pull(repo, "Q4_K_M")
    assert not hub.requests


def test_a_gated_repository_wants_a_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(REPO)
    with pytest.raises(DownloadError, match=rf"repository '{REPO}' is gated: accept its terms at {hub.url}/{REPO} and set HF_TOKEN"):
        pull(REPO, "Q4_K_M")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pull(REPO, "Q4_K_M").is_file()
    assert hub.tokens[-1] == "Bearer hf_secret"


def test_without_a_network_the_cache_serves(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(DownloadError, match=r"cannot ask the hub for 'owner/model-GGUF', and the cache has no file of it"):
        pull(REPO, "Q8_0")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    path = pull(REPO, "Q8_0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull(REPO, "Q8_0") == path
    assert pull(REPO, PARTS[0], revision=COMMIT) == path
    with pytest.raises(FileNotFoundError, match=r"the cache has no file 'Q4_K_M' \(the hub was not asked: .*\); its GGUF files are Q8_0/"):
        pull(REPO, "Q4_K_M")


# ---- what uses it


@pytest.fixture
def tiny_on_hub(hub: FakeHub, tiny_model: Callable[[str], Path]) -> str:
    shutil.copy(tiny_model("qwen3moe"), hub.folder / REPO / "tiny-F16.gguf")
    return f"{REPO}/tiny-F16.gguf"


def test_a_model_is_loaded_from_the_hub(hub: FakeHub, tiny_on_hub: str, tiny_model: Callable[[str], Path]) -> None:
    with Model.from_hub(REPO, "F16", experts="cpu", devices=[]) as model, Model(tiny_model("qwen3moe"), experts="cpu", devices=[]) as here:
        assert Path(model.path).name == "tiny-F16.gguf"
        assert model.metadata == here.metadata
    with llama_moe.load(tiny_on_hub, devices=[], context_size=256) as llm:
        assert llm.model.architecture == "qwen3moe"
    with pytest.raises(FileNotFoundError, match=r"there is no file 'owner/model-GGUF/none\.gguf' here, and on the hub: .*tiny-F16\.gguf"):
        llama_moe.load(f"{REPO}/none.gguf")


def test_a_file_of_this_machine_is_itself(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a" / "b" / "c.gguf"
    file.parent.mkdir(parents=True)
    file.touch()
    assert local_model("a/b/c.gguf") == "a/b/c.gguf"
    assert local_model(file) == file
    assert not hub.requests


def test_the_command_writes_where_the_file_is(hub: FakeHub, tiny_on_hub: str) -> None:
    pulled = cli("pull", REPO, "tiny-F16.gguf")
    assert pulled.returncode == 0, pulled.stderr
    path = Path(pulled.stdout.strip())
    assert path.read_bytes() == content(hub, "tiny-F16.gguf")
    assert pulled.stderr == ""
    again = cli("pull", tiny_on_hub)
    assert again.stdout == pulled.stdout
    ran = cli("run", tiny_on_hub, "-p", "Hello", "-n", 4, "--ctx", 256, "--temp", 0)
    assert ran.returncode == 0, ran.stderr
    missing = cli("pull", REPO, "Q5_K_M")
    assert missing.returncode == 1
    assert "has no file 'Q5_K_M'; its GGUF files are" in missing.stderr


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(llama_moe.errors.LlamaMoeError, match=re.escape('pip install "llama-moe[hub]"')):
        pull(REPO, "Q4_K_M")


def test_a_terminal_shows_the_progress(hub: FakeHub, tiny_on_hub: str) -> None:
    with Terminal([*COMMAND, "pull", tiny_on_hub]) as terminal:
        assert terminal.finish() == 0
        assert re.search(r"tiny-F16\.gguf .*[0-9.]+/[0-9.]+ [KM]iB", terminal.shown)
