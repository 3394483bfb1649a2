"""`llama-moe tune`, and what it found used by `llama-moe run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import llama_moe
from tests.support.lora_files import weights_of, write_lora
from tests.support.processes import COMMAND, Program, cli
from tests.support.waiting import eventually

QUICK = ["-p", 8, "-n", 4, "-r", 1, "--ctx", 256, "--minutes", 30]


@pytest.fixture
def path(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    return tiny_model("qwen3moe")


def test_what_a_sweep_found_is_used(path: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter.gguf", weights_of(path, containing=("attn_q.",)), architecture="qwen3moe")
    lora = ["--lora", f"{tmp_path / 'adapter.gguf'}=0.5"]
    ran = cli("tune", path, *QUICK, *lora, "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert len(report["profile"]["key"]["lora"]) == 1
    assert report["in_time"] is True
    assert report["trials"][0]["options"]["experts"] == "fit"
    assert report["profile"]["options"] == report["winner"]["options"]
    stored = llama_moe.Profile.read(report["path"])
    assert stored.options == llama_moe.TunedOptions.from_dict(report["winner"]["options"])
    # A second one has nothing to do but to tell.
    shown = cli("tune", path, *QUICK, *lora)
    assert shown.returncode == 0, shown.stderr
    assert report["path"] in shown.stdout
    assert shown.stdout.splitlines()[0].split()[0] == "experts"
    greedy = ["-p", "Hello", "-n", 8, "--ctx", 256, "--temp", 0]
    for profile in ("auto", report["path"]):
        assert cli("run", path, *greedy, *lora, "--profile", profile).returncode == 0


def test_ctrl_c_ends_the_trial_too(path: Path) -> None:
    with Program([*COMMAND, "tune", str(path), *map(str, QUICK)]) as program:
        running = psutil.Process(program.pid)
        assert eventually(lambda: bool(running.children()))
        (trial,) = running.children()
        program.interrupt()
        status, stdout, stderr = program.finish()
    # A trial that had only just been started ends by itself, as its input does, and is then its new parent's to reap.
    assert psutil.wait_procs([trial], timeout=60)[0] == [trial]
    assert status == 130
    assert stdout == ""
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--objective", "sleep"], 1, "'sleep'"),
        (["--minutes", "0"], 1, "minutes is 0"),
        (["--vram", "little"], 1, "'little'"),
        (["--max-sequences", "0"], 2, "--max-sequences"),
        (["--rpc", "127.0.0.1:1"], 1, "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_tuned_says_so(path: Path, options: list[str], status: int, message: str) -> None:
    ran = cli("tune", path, *options)
    assert ran.returncode == status
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_profile_that_is_not_there_is_a_failure(path: Path, tmp_path: Path) -> None:
    ran = cli("run", path, "-p", "x", "--profile", tmp_path / "missing.json")
    assert ran.returncode == 1
    assert "missing.json" in ran.stderr
