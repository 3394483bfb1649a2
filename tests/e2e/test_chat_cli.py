"""`llama-moe chat` as a person and a script use it: in a real terminal, and from a pipe."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llama_moe
from llama_moe import SamplingParams
from tests.support.processes import COMMAND, cli
from tests.support.terminal import Terminal

ENTER, CTRL_C, CTRL_D, UP, LEFT, BACKSPACE = "\r", "\x03", "\x04", "\x1b[A", "\x1b[D", "\x7f"
OPTIONS = ["--temp", "0", "--threads", "1", "--no-repack"]


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def chat(path: Path, stdin: str, *options: object) -> subprocess.CompletedProcess[str]:
    return cli("chat", path, "--ctx", 512, "-n", 8, *OPTIONS, *options, stdin=stdin)


def answers(path: Path, *messages: str, system: str | None = None) -> list[str]:
    """What the engine answers to these messages in turn."""
    conversation = [] if system is None else [{"role": "system", "content": system}]
    params = SamplingParams(max_tokens=8, temperature=0)
    given = []
    with llama_moe.load(path, experts="gpu", devices=[], context_size=512, threads=1, repack=False) as llm:
        for message in messages:
            conversation.append({"role": "user", "content": message})
            given.append(llm.chat(conversation, params).text)
            conversation.append({"role": "assistant", "content": given[-1]})
    return given


@pytest.fixture
def terminal(path: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat whose answers would be long: 30,000 tokens."""
    with Terminal([*COMMAND, "chat", str(path), "--ctx", "30000", *OPTIONS], LLAMA_MOE_CACHE=str(tmp_path)) as terminal:
        terminal.wait_for("/help shows the commands")
        terminal.wait_for_prompt("> ")
        yield terminal


# ---- from a pipe


def test_each_line_is_a_message_of_one_conversation(path: Path) -> None:
    done = chat(path, "Hello\nAnd then?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(text + "\n" for text in answers(path, "Hello", "And then?"))


def test_a_system_message_and_long_messages(path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    done = chat(path, f'one \\\ntwo\n"""\nthree\n\n/four\n"""\n//five\n/save {saved}\n', "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    texts = ["one \ntwo", "three\n\n/four", "/five"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert [message["content"] for message in messages if message["role"] == "user"] == texts
    assert [message["content"] for message in messages if message["role"] == "assistant"] == answers(path, *texts, system="Be brief.")
    assert f"(7 messages written to {saved})" in done.stderr


def test_commands_change_the_conversation(path: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.txt"
    typed = ["Hello", "/retry", "/undo", "Red", "Blue", "/undo", "/system Be kind.", "/retry", f"/save {saved}", "/reset", "/stats"]
    done = chat(path, "\n".join([*typed, "/undo", "/retry", "/exit", "no more"]))
    assert done.returncode == 0, done.stderr
    (hello,) = answers(path, "Hello")
    red, blue = answers(path, "Red", "Blue")
    (kind,) = answers(path, "Red", system="Be kind.")
    assert done.stdout == "".join(text + "\n" for text in (hello, hello, red, blue, kind))
    assert saved.read_text(encoding="utf-8") == f"system:\nBe kind.\n\nuser:\nRed\n\nassistant:\n{kind}\n"
    for said in ("(the conversation is empty)", "(the last message is now: Red)", "(system message: Be kind.)", "(a new conversation)"):
        assert said in done.stderr
    assert "0 messages, 0 of them in the context: 0 of 512 tokens" in done.stderr
    assert "memory: CPU " in done.stderr
    assert "(nothing to take back)" in done.stderr
    assert "(nothing to answer)" in done.stderr


def test_what_is_no_command_is_said(path: Path) -> None:
    done = chat(path, "/nonsense\n/save\n/save /no/such/folder/file\n/system\n/help\n\n")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "/nonsense is no command; /help shows them" in done.stderr
    assert "give a file: /save FILE" in done.stderr
    assert "error: /no/such/folder/file: No such file or directory" in done.stderr
    assert "(no system message)" in done.stderr
    for command in ("/reset    Begins a new conversation", "/retry    Answers the last message again", "/exit     Leaves"):
        assert command in done.stderr


def test_a_full_context_drops_the_oldest_messages_and_says_so(path: Path) -> None:
    words = "word " * 20
    done = chat(path, f"{words}\n" * 6 + "/stats\n", "--ctx", 256)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 6
    assert "(the context of 256 tokens is full: the oldest 2 messages are not in it any more; /reset begins anew)" in done.stderr
    assert "12 messages, " in done.stderr
    too_long = chat(path, "Hello\n" + "word " * 300 + "\n", "--ctx", 256)
    assert too_long.returncode == 1
    assert "error: the message and what goes with it are" in too_long.stderr
    assert "the context holds 256 (--ctx)" in too_long.stderr


def test_the_end_of_the_context_is_told_from_the_end_of_an_answer(path: Path) -> None:
    done = cli("chat", path, "--ctx", 256, *OPTIONS, stdin="Hello\n")
    assert "(the answer came to the end of the context of 256 tokens; --ctx makes it larger)" in done.stderr
    assert "end of the context" not in chat(path, "Hello\n").stderr


def test_a_model_without_a_chat_format_is_refused(tiny_model: Callable[[str], Path]) -> None:
    done = cli("chat", tiny_model("deepseek"), stdin="Hello\n")
    assert done.returncode == 1
    assert "chat template" in done.stderr


# ---- in a terminal


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.type("Hello" + ENTER)
    began = terminal.wait_for("Hello\n")
    terminal.wait_for(" ", after=began)  # it writes
    terminal.type(CTRL_C)
    stopped = terminal.wait_for("(stopped; Ctrl-C again, Ctrl-D or /exit leaves)", after=began)
    terminal.wait_for_prompt("> ", after=stopped)
    terminal.type("/stats" + ENTER)
    terminal.wait_for_prompt("> ", after=terminal.wait_for("2 messages, 2 of them in the context", after=stopped))
    terminal.type("/exit" + ENTER)
    assert terminal.finish() == 0


@pytest.mark.parametrize("during_an_answer", [False, True])
def test_a_second_ctrl_c_leaves(terminal: Terminal, during_an_answer: bool) -> None:
    if during_an_answer:
        terminal.type("Hello" + ENTER)
        terminal.wait_for(" ", after=terminal.wait_for("Hello\n"))
        terminal.type(CTRL_C)
        terminal.wait_for_prompt("> ", after=terminal.wait_for("(stopped;"))
    else:
        terminal.type("not sent")
        terminal.wait_for_prompt("> not sent")
        terminal.type(CTRL_C)
        terminal.wait_for_prompt("> ", after=terminal.wait_for("(Ctrl-C again, Ctrl-D or /exit leaves)"))
    terminal.type(CTRL_C)
    assert terminal.finish() == 0


def test_something_between_two_ctrl_c_keeps_it_running(terminal: Terminal) -> None:
    at = 0
    for _ in range(2):
        terminal.type(CTRL_C)
        at = terminal.wait_for_prompt("> ", after=terminal.wait_for("(Ctrl-C again", after=at))
        terminal.type("/system" + ENTER)
        at = terminal.wait_for_prompt("> ", after=terminal.wait_for("(no system message)", after=at))
    terminal.type(CTRL_D)
    assert terminal.finish() == 0


def test_lines_can_be_edited_and_called_back(terminal: Terminal, path: Path, tmp_path: Path) -> None:
    terminal.type("/systemx Be" + LEFT * 3 + BACKSPACE + ENTER)
    at = terminal.wait_for_prompt("> ", after=terminal.wait_for("(system message: Be)"))
    terminal.type("/system -" + ENTER)
    at = terminal.wait_for_prompt("> ", after=terminal.wait_for("(no system message)", after=at))
    terminal.type(UP + UP + " kind" + ENTER)
    terminal.wait_for_prompt("> ", after=terminal.wait_for("(system message: Be kind)", after=at))
    terminal.type(CTRL_D)
    assert terminal.finish() == 0
    history = tmp_path / "chat_history"
    assert history.stat().st_mode & 0o077 == 0
    with Terminal([*COMMAND, "chat", str(path), "--ctx", "256", *OPTIONS], LLAMA_MOE_CACHE=str(tmp_path)) as later:
        later.wait_for_prompt("> ", after=later.wait_for("/help"))
        later.type(UP + ENTER)
        later.wait_for_prompt("> ", after=later.wait_for("(system message: Be kind)"))
        later.type("/sys\t" + CTRL_C)
        later.wait_for("/system")


def test_a_history_is_not_kept_when_it_is_not_wanted(path: Path, tmp_path: Path) -> None:
    with Terminal([*COMMAND, "chat", str(path), "--no-history", *OPTIONS], LLAMA_MOE_CACHE=str(tmp_path)) as terminal:
        terminal.wait_for_prompt("> ", after=terminal.wait_for("/help"))
        terminal.type("/system secret" + ENTER)
        terminal.wait_for_prompt("> ", after=terminal.wait_for("(system message: secret)"))
        terminal.type(CTRL_D)
        assert terminal.finish() == 0
    assert not (tmp_path / "chat_history").exists()
