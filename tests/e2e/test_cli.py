"""The command line as a user runs it: real processes, their output, their exit status."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_moe
from llama_moe.worker import Worker
from tests.support.plugins import write_plugin
from tests.support.processes import COMMAND, Program, cli


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def run_tiny(path: Path, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return cli("run", path, "-n", 12, "--ctx", 256, "--temp", 0, "--threads", 1, "--no-repack", *arguments, stdin=stdin)


def load_tiny(path: Path) -> llama_moe.Engine:
    return llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False)


def greedy_text(path: Path, prompt: str) -> str:
    with load_tiny(path) as llm:
        return llm.generate(prompt, llama_moe.SamplingParams(max_tokens=12, temperature=0)).text


def test_run_writes_the_text_to_stdout_and_the_speed_to_stderr(path: Path) -> None:
    ran = run_tiny(path, "-p", "Hello")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == greedy_text(path, "Hello") + "\n"
    assert "tokens/s" in ran.stderr
    assert "first token after" in ran.stderr


def test_run_reads_the_prompt_from_stdin(path: Path) -> None:
    ran = run_tiny(path, "-p", "-", stdin="Hello")
    assert ran.stdout == greedy_text(path, "Hello") + "\n"


@pytest.mark.parametrize(
    "placement", [[], ["--cpu-moe"], ["--n-cpu-moe", "1"], ["--experts-on", r"blk\.1\.ffn_.*_exps=CPU", "--experts-on", "down_exps=RPC0"]]
)
def test_run_with_an_rpc_worker_gives_the_same_text_under_every_placement(path: Path, worker: Worker, placement: list[str]) -> None:
    ran = run_tiny(path, "-p", "Hello", "--rpc", worker.endpoint, "--memory", *placement)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == greedy_text(path, "Hello") + "\n"
    assert "RPC0" in ran.stderr
    assert "kv_cache" in ran.stderr


@pytest.mark.parametrize(
    ("options", "system"), [(["--chat"], None), (["--system", "Be brief."], "Be brief."), (["--chat", "--system", ""], "")]
)
def test_run_answers_in_the_format_of_the_chat_template(path: Path, options: list[str], system: str | None) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    with load_tiny(path) as llm:
        params = llama_moe.SamplingParams(max_tokens=12, temperature=0)
        expected = llm.chat([*messages, {"role": "user", "content": "Hello"}], params).text
    ran = run_tiny(path, "-p", "Hello", *options)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == expected + "\n"
    assert "tokens/s" in ran.stderr


def test_run_keeps_to_a_grammar_or_a_schema_and_stops_where_it_is_told_to(path: Path, tmp_path: Path) -> None:
    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text('root ::= "one, two, three"', encoding="utf-8")
    assert run_tiny(path, "-p", "Hello", "-n", 99, "--grammar", grammar).stdout == "one, two, three\n"
    stopped = run_tiny(path, "-p", "Hello", "-n", 99, "--grammar", grammar, "--stop", "xyz", "--stop", ", three")
    assert stopped.stdout == "one, two\n"
    schema = '{"const": "yes"}'
    (tmp_path / "schema.json").write_text(schema, encoding="utf-8")
    for given in (schema, tmp_path / "schema.json"):
        assert json.loads(run_tiny(path, "-p", "Hello", "-n", 99, "--json-schema", given).stdout) == "yes"


def test_drafted_tokens_make_no_difference(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")  # its weights compute the same whatever the batch
    for options in (["--lookup"], ["--draft-model", path]):
        ran = run_tiny(path, "-p", "Hello", *options)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == greedy_text(path, "Hello") + "\n"


def test_a_seed_repeats_the_text(path: Path) -> None:
    texts = {cli("run", path, "-p", "Hello", "-n", 8, "--ctx", 256, "--threads", 1, "--temp", 1, "--seed", 7).stdout for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "MODEL"],
        ["run", "MODEL", "-p", "x", "--cpu-moe", "--n-cpu-moe", "1"],
        ["run", "MODEL", "-p", "x", "--cpu-moe", "--experts-on", "a=CPU"],
        ["run", "MODEL", "-p", "x", "--experts-on", "no-device"],
        ["run", "MODEL", "-p", "x", "-n", "0"],
        ["run", "MODEL", "-p", "x", "--grammar", "g.gbnf", "--json-schema", "{}"],
        ["run", "MODEL", "-p", "x", "--grammar", "no-such-file"],
        ["run", "MODEL", "-p", "x", "--json-schema", "no-such-file"],
        ["run", "MODEL", "-p", "x", "--json-schema", "MODEL"],
        ["run", "MODEL", "-p", "x", "--lookup", "--draft-model", "MODEL"],
        ["run", "MODEL", "-p", "x", "--no-such-option"],
        ["no-such-command"],
        ["worker", "--bind", "0.0.0.0:50052"],
        ["worker", "--bind", "nonsense"],
    ],
)
def test_wrong_usage_exits_with_2_and_says_so_on_stderr(path: Path, arguments: list[str]) -> None:
    ran = cli(*[path if argument == "MODEL" else argument for argument in arguments])
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr


def test_a_worker_that_others_could_reach_is_refused_with_the_reason() -> None:
    ran = cli("worker", "--bind", "0.0.0.0:50052")
    assert "--allow-remote" in ran.stderr
    assert "authentication" in ran.stderr


def test_a_worker_says_when_its_port_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = cli("worker", "--bind", f"127.0.0.1:{taken.getsockname()[1]}")
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")
    assert "in use" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-cpu-moe", "99"], "99"),
        (["--experts-on", r"blk\.99\.=CPU"], r"blk\.99\."),
        (["--experts-on", "(=CPU"], "regular expression"),
        (["--experts-on", "exps=NoSuchDevice"], "NoSuchDevice"),
        (["--rpc", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--json-schema", '{"type": "word"}'], "word"),
        (["--json-schema", "{"], "not JSON"),
        (["--draft-model", "no-such-model"], "no-such-model"),
    ],
)
def test_a_failure_exits_with_1_and_one_line_with_the_value(path: Path, arguments: list[str], message: str) -> None:
    ran = cli("run", path, "-p", "x", *arguments)
    assert ran.returncode == 1
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_file_that_cannot_be_read_is_named_with_its_option(path: Path) -> None:
    for option, file, reason in (("--grammar", "no-such-file", "No such file"), ("--json-schema", path, "not text in UTF-8")):
        stderr = cli("run", path, "-p", "x", option, file).stderr
        assert option in stderr
        assert f"{str(file)!r}" in stderr
        assert reason in stderr


def test_a_chat_needs_a_template(tiny_model: Callable[[str], Path]) -> None:
    ran = run_tiny(tiny_model("llama"), "-p", "Hello", "--chat")
    assert ran.returncode == 1
    assert "no chat template" in ran.stderr


@pytest.mark.parametrize("command", [["run", "-p", "x"], ["inspect"]])
def test_a_missing_model_is_a_failure(tmp_path: Path, command: list[str]) -> None:
    ran = cli(*command, tmp_path / "missing.gguf")
    assert ran.returncode == 1
    assert "missing.gguf" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ctrl_c_exits_with_130(demo_path: Path) -> None:
    with Program([*COMMAND, "run", str(demo_path), "-p", "Once upon a time", "-n", "4000", "--threads", "1", "--temp", "1"]) as program:
        first = program.stdout.read(1)
        program.interrupt()
        status, _, stderr = program.finish()
    assert first
    assert status == 130
    assert "Traceback" not in stderr


def test_inspect_shows_experts_and_sizes(path: Path) -> None:
    shown = cli("inspect", path)
    assert shown.returncode == 0
    for word in ("qwen3moe", "experts", "weights", "embedding"):
        assert word in shown.stdout
    facts = json.loads(cli("inspect", path, "--json").stdout)
    info = llama_moe.inspect(path)
    assert facts["expert_count"] == info.expert_count
    assert sum(role["bytes"] for role in facts["roles"].values()) == facts["size_bytes"] == info.size_bytes


def test_devices_lists_the_cpu_and_workers(worker: Worker) -> None:
    listed = json.loads(cli("devices", "--json", "--rpc", worker.endpoint).stdout)
    assert {"CPU", "RPC0"} <= {device["name"] for device in listed}
    assert worker.endpoint in cli("devices", "--rpc", worker.endpoint).stdout


def test_doctor_says_what_was_found() -> None:
    ran = cli("doctor", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["build"] == llama_moe.build_info()
    assert "CPU" in {device["name"] for device in found["devices"]}
    text = cli("doctor").stdout
    assert llama_moe.build_info()["llama_cpp_commit"] in text
    assert "libcuda.so.1" in text


def test_doctor_fails_when_a_plugin_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_plugin(tmp_path, llama_cpp_commit="0123456")))
    ran = cli("doctor")
    assert ran.returncode == 1
    assert "broken: llama-moe-fake 1.2 is skipped" in ran.stdout
    assert "0123456" in ran.stdout


def test_demo_model_writes_a_model_that_runs(tmp_path: Path, dense_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    assert dense_path.exists()  # fetched before, so that this measures writing only
    ran = cli("demo-model", out, "--experts", 4, "--used", 2)
    assert ran.returncode == 0, ran.stderr
    info = llama_moe.inspect(out)
    assert (info.expert_count, info.experts_used) == (4, 2)
    refused = cli("demo-model", tmp_path / "no.gguf", "--experts", 2, "--used", 3)
    assert refused.returncode == 1
    assert not (tmp_path / "no.gguf").exists()


def test_demo_generates_and_says_what_was_saved(demo_path: Path) -> None:
    ran = cli("demo")
    assert ran.returncode == 0, ran.stderr
    for words in ("stands in for one", "kv_cache", "experts", "saved"):
        assert words in ran.stdout


def test_help_and_version() -> None:
    assert llama_moe.__version__ in cli("--version").stdout
    shown = cli("--help")
    assert shown.returncode == 0
    for command in ("run", "bench", "tune", "inspect", "devices", "worker", "demo-model", "demo"):
        assert command in shown.stdout
