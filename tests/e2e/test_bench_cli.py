"""`llama-moe bench` as a user runs it, and as a program reads it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_moe
from llama_moe.worker import Worker
from tests.support.processes import cli

QUICK = ["-p", 8, "-n", 4, "-r", 2, "--ctx", 256, "--threads", 1]


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def test_json_has_what_was_measured_and_on_what(path: Path, worker: Worker) -> None:
    ran = cli("bench", path, *QUICK, "--rpc", worker.endpoint, "--json")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert [row["placement"] for row in report["rows"]] == ["gpu", "cpu", "fit"]
    for row in report["rows"]:
        assert row["error"] is None
        assert row["prompt"]["tokens"] == [8, 8]
        assert row["decode"]["tokens"] == [4, 4]
        assert set(row["time_to_first_token"]) == {"mean", "stdev", "median", "min", "max"}
        assert row["memory"]["total_bytes"] > row["device_bytes"] > 0
    gpu, cpu, _ = report["rows"]
    assert cpu["saved_bytes"] == gpu["device_bytes"] - cpu["device_bytes"] > 0
    assert report["build"]["version"] == llama_moe.__version__
    assert report["threads"] == 1
    assert report["machine"]["cpu"]
    assert [device["description"] for device in report["accelerators"]] == [worker.endpoint]


def test_a_context_of_0_is_what_the_model_was_trained_for(path: Path) -> None:
    ran = cli("bench", path, *QUICK, "--ctx", 0, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["context_size"] == 1024


def test_csv_has_a_line_for_each_placement(path: Path) -> None:
    ran = cli("bench", path, *QUICK, "--placements", "gpu, first:1", "--csv")
    assert ran.returncode == 0, ran.stderr
    rows = list(csv.DictReader(io.StringIO(ran.stdout)))
    assert [row["placement"] for row in rows] == ["gpu", "first:1"]
    assert all(float(row["decode_tokens_per_second_median"]) > 0 for row in rows)
    assert all(None not in row and None not in row.values() for row in rows)


def test_markdown_is_a_table(path: Path) -> None:
    ran = cli("bench", path, *QUICK, "--placements", "gpu,cpu", "--markdown")
    assert ran.returncode == 0, ran.stderr
    head, rule, *rows = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2
    assert set(rule) <= set("|-: ")
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert "no accelerator" in ran.stdout


def test_a_placement_that_fails_is_a_row_and_the_exit_status(path: Path) -> None:
    ran = cli("bench", path, *QUICK, "--placements", "gpu,first:99,nonsense", "--json")
    assert ran.returncode == 1
    good, *bad = json.loads(ran.stdout)["rows"]
    assert good["error"] is None
    assert "99" in bad[0]["error"]
    assert "nonsense" in bad[1]["error"]
    assert ran.stderr.count("error: ") == 2
    table = cli("bench", path, *QUICK, "--placements", "gpu,first:99")
    assert table.returncode == 1
    assert "first:99 failed: " in table.stdout


def test_quality_stands_beside_the_speed(path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3, encoding="utf-8")
    ran = cli("bench", path, *QUICK, "--placements", "gpu,cpu", "--quality", text, "--quality-tokens", 50, "--json")
    assert ran.returncode == 0, ran.stderr
    reference, other = (row["quality"] for row in json.loads(ran.stdout)["rows"])
    assert reference["top_agreement"] is None
    assert (reference["tokens"], other["tokens"]) == (49, 49)
    assert (other["top_agreement"], other["mean_kl"]) == (1, 0)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--json", "--csv"], 2, "--json"),
        (["--quality", "no-such-file"], 2, "no-such-file"),
        (["-r", "0"], 2, "--repetitions"),
        (["--quality-tokens", "50"], 2, "--quality-tokens"),
        (["--placements", ","], 1, "placements is empty"),
        (["--ctx", "4"], 1, "context_size is 4"),
        (["--against", "no-such-file"], 1, "no-such-file"),
    ],
)
def test_what_cannot_be_measured_says_so(path: Path, options: list[str], status: int, message: str) -> None:
    ran = cli("bench", path, *options)
    assert ran.returncode == status
    assert ran.stdout == ""
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
