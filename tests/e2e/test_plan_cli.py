"""`llama-moe plan` as a user runs it, and as a program reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.http_files import FileServer
from tests.support.processes import cli
from tests.support.tiny_models import DENSE


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def test_three_plans_side_by_side(path: Path) -> None:
    ran = cli("plan", path, "--vram", "2GiB", "--ram", "8GiB", "--ctx", 512)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert "qwen3moe.gguf: qwen3moe, 4 layers, 8 experts of which 2 compute a token, " in lines[0]
    assert lines[1] == "512 tokens of context, KV cache in f16"
    assert "all on GPU  experts on CPU" in lines[3]
    table = {line[:22].strip(): line.split()[-3:] for line in lines if line}
    assert table["fits"] == ["yes", "yes", "yes"]
    assert table["reduction"][0] == "-"
    assert table["reduction"][1].endswith("%")
    assert all(float(speed) > 0 for speed in table["tokens/s (predicted)"])
    assert "fit: all experts stay with their layers" in lines
    assert "assumed" in lines[-1]


def test_json(path: Path) -> None:
    ran = cli("plan", path, "--vram", "3GiB", "--vram", "2GiB", "--bandwidth", "400GB/s", "--json", "--max-sequences", 2)
    assert ran.returncode == 0, ran.stderr
    plans = json.loads(ran.stdout)
    assert list(plans) == ["gpu", "cpu", "fit"]
    for plan in plans.values():
        assert plan["fits"] is True
        assert plan["device_bytes"] == sum(row["bytes"] for row in plan["rows"] if row["device"] in ("GPU0", "GPU1"))
        assert plan["prediction"]["predicted"] is True
        assert plan["prediction"]["decode_tokens_per_second"] > 0
    assert plans["cpu"]["saved_bytes"] == plans["gpu"]["device_bytes"] - plans["cpu"]["device_bytes"] > 0
    assert plans["cpu"]["reduction"] == pytest.approx(plans["cpu"]["saved_bytes"] / plans["gpu"]["device_bytes"])


def test_what_does_not_fit_is_said_with_what_would_help(path: Path) -> None:
    ran = cli("plan", path, "--vram", "5MiB", "--overhead", "0MiB", "--reserve", "0MiB", "--ctx", 8192, "--no-predict")
    assert ran.returncode == 1
    assert "no, " in ran.stdout
    assert "error: " in ran.stderr
    assert "GPU needs" in ran.stderr
    assert "it would with context_size=" in ran.stderr


def test_a_dense_model_and_a_model_on_a_server(tiny_model: Callable[[str], Path]) -> None:
    dense = tiny_model(DENSE)
    with FileServer(dense.parent) as server:
        ran = cli("plan", f"{server.url}/{dense.name}", "--vram", "2GiB", "--no-predict")
    assert ran.returncode == 0, ran.stderr
    assert "no experts" in ran.stdout
    assert "experts on CPU" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vram", "lots"], "vram: 'lots' is not a size"),
        (["--vram", "1GiB", "--bandwidth", "fast"], "'fast' is not a rate"),
        (["--kv-type", "q9_9"], "kv_type is 'q9_9'"),
        (["--overhead", "1GiB"], "none is given"),
    ],
)
def test_bad_options_are_one_line(path: Path, arguments: list[str], message: str) -> None:
    ran = cli("plan", path, *arguments)
    assert ran.returncode in (1, 2)
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
