"""`llama-moe chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_moe import SamplingParams
from llama_moe._files import written_whole
from llama_moe._sizes import format_size
from llama_moe.errors import ContextFullError, LlamaMoeError

from . import options
from .console import exit_codes, note
from .line_input import MessageReader
from .loading import opening

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_moe import ChatCompletion, Engine

# Of the context, what is kept free for an answer when older turns are dropped.
_ANSWER_SHARE = 4


@exit_codes()
def chat(
    model: options.ModelOrHub,
    *,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    cpu_moe: options.CpuMoe = False,
    n_cpu_moe: options.NCpuMoe = None,
    experts_on: options.ExpertsOn = None,
    rpc: options.Rpc = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Most tokens of an answer. Default: what there is room for."),
    ] = None,
    context_size: options.ContextSize = 4096,
    temperature: options.Temperature = 0.8,
    seed: options.Seed = None,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking", help="Let a model that can think first do so.")] = True,
    lookup: options.Lookup = False,
    draft_model: options.DraftModel = None,
    threads: options.Threads = None,
    repack: options.TunableRepack = None,
    expert_kernels: options.TunableExpertKernels = None,
    profile: options.Profile = None,
    lora: options.Lora = None,
    history: Annotated[bool, typer.Option("--history/--no-history", help="Keep what is typed, for the arrow keys of later chats.")] = True,
    memory: options.Memory = False,
) -> None:
    """Chat with a model in the terminal.

    Ctrl-C stops an answer and not the program. /help shows what else can be done. When the context is full, the oldest messages leave it.
    From a pipe, each line is a message. Answers go to standard output, everything else to standard error.
    """
    opened = opening(
        model,
        cpu_moe=cpu_moe,
        n_cpu_moe=n_cpu_moe,
        experts_on=experts_on,
        rpc=rpc,
        context_size=context_size,
        lookup=lookup,
        draft_model=draft_model,
        threads=threads,
        repack=repack,
        expert_kernels=expert_kernels,
        profile=profile,
        lora=lora,
    )
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    with opened as engine:
        conversation = Chat(engine, params, system=system, thinking=thinking)
        reader = MessageReader(conversation.commands, keep=history)
        with contextlib.closing(reader):
            if reader.interactive:
                about = f"{engine.model.description}, {engine.context_size} tokens of context"
                note(f"{about}. /help shows the commands; Ctrl-C stops an answer.")
            _converse(conversation, reader)
            if memory:
                note(str(engine.memory()))


def _converse(chat: Chat, reader: MessageReader) -> None:
    """Reads and answers. Ctrl-C stops an answer or drops a line; a second one right after it leaves."""
    interrupted = False
    while True:
        try:
            message = reader.read()
            if message is None:
                break
            interrupted = not chat.take(message)
            if chat.left:
                return
        except LlamaMoeError as error:
            if not reader.interactive:
                raise
            interrupted = False
            note("error: " + "; ".join(str(error).splitlines()))
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
            note()
            if interrupted:
                return
            interrupted = True
            note("(Ctrl-C again, Ctrl-D or /exit leaves)")
    if reader.interactive:
        note()


class Chat:
    """A conversation, and the commands on it."""

    def __init__(self, engine: Engine, params: SamplingParams, *, system: str | None, thinking: bool) -> None:
        self._engine = engine
        self._params = params
        self._thinking = thinking
        self._format = engine.model.chat_format()  # a model without one is told of before anything is typed
        self._system = system or ""
        self._messages: list[dict[str, str]] = []
        self._first = 0  # of the messages, those before were dropped from the context
        self._last: ChatCompletion | None = None
        self.left = False
        self._commands: dict[str, Callable[[str], bool | None]] = {
            "/help": self._help,
            "/exit": self._exit,
            "/reset": self._reset,
            "/system": self._set_system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": self._stats,
        }

    @property
    def commands(self) -> list[str]:
        """Their names."""
        return list(self._commands)

    def take(self, message: str) -> bool:
        """Answers a message or runs a command; False if Ctrl-C stopped it."""
        if not message.strip():
            return True
        if message.startswith("/") and not message.startswith("//"):
            name, _, argument = message.strip().partition(" ")
            command = self._commands.get(name)
            if command is None:
                note(f"{name} is no command; /help shows them. A message that begins with a slash is written with two.")
                return True
            return command(argument.strip()) is not False
        self._messages.append({"role": "user", "content": message[1:] if message.startswith("//") else message})
        return self._answer()

    # ---- answers

    def _answer(self) -> bool:
        """Answers the last message; False if Ctrl-C stopped it. A message that cannot be answered is taken back."""
        try:
            self._make_room()
            return self._stream()
        except BaseException:
            self._take_back()
            raise

    def _stream(self) -> bool:
        text = ""
        stream = self._engine.stream_chat(self._context(), self._params, enable_thinking=self._thinking)
        stopped = False
        try:
            for delta in stream:
                sys.stderr.write(delta.reasoning)
                sys.stderr.flush()
                text += str(delta)
                sys.stdout.write(str(delta))
                sys.stdout.flush()
        except KeyboardInterrupt:
            stopped = True
        finally:
            stream.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
        completion = stream.completion
        self._last = completion
        if stopped:
            note("(stopped; Ctrl-C again, Ctrl-D or /exit leaves)")
        elif completion.finish_reason == "length" and len(completion.tokens) != self._params.max_tokens:
            note(f"(the answer came to the end of the context of {self._engine.context_size} tokens; --ctx makes it larger)")
        self._messages.append({"role": "assistant", "content": text})
        return not stopped

    def _make_room(self) -> None:
        """Drops the oldest turns from the context until the rest leaves room for an answer."""
        size = self._engine.context_size
        room = size // _ANSWER_SHARE
        if self._params.max_tokens is not None:
            room = min(room, self._params.max_tokens)
        dropped = 0
        while (used := self._prompt_tokens()) + room > size:
            following = next((i for i in range(self._first + 1, len(self._messages)) if self._messages[i]["role"] == "user"), None)
            if following is None:
                if used >= size:
                    raise ContextFullError(f"the message and what goes with it are {used} tokens; the context holds {size} (--ctx)")
                break
            dropped += following - self._first
            self._first = following
        if dropped:
            note(f"(the context of {size} tokens is full: the oldest {dropped} messages are not in it any more; /reset begins anew)")

    def _context(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages[self._first :]]

    def _prompt_tokens(self) -> int:
        prompt = self._format.apply(self._context(), self._params, enable_thinking=self._thinking)
        return len(self._engine.model.tokenize(prompt.text, parse_special=True))

    # ---- commands: the first line of each says in /help what it does

    def _help(self, _argument: str) -> None:
        """Shows this."""
        for name, command in self._commands.items():
            note(f"{name:9} {(inspect.getdoc(command) or '').splitlines()[0]}")
        note('A line that ends with \\ goes on in the next; """ begins and ends a message of several lines.')
        note("Ctrl-C stops an answer; pressed again it leaves, as Ctrl-D does.")

    def _exit(self, _argument: str) -> None:
        """Leaves."""
        self.left = True

    def _reset(self, _argument: str) -> None:
        """Begins a new conversation, with the same system message."""
        self._messages.clear()
        self._first = 0
        note("(a new conversation)")

    def _set_system(self, argument: str) -> None:
        """Shows the system message, or sets it: /system TEXT. /system - removes it."""
        if argument:
            self._system = "" if argument == "-" else argument
        note(f"(system message: {self._system})" if self._system else "(no system message)")

    def _undo(self, _argument: str) -> None:
        """Takes back the last message and its answer."""
        if not self._take_back():
            note("(nothing to take back)")
            return
        left = [message["content"] for message in self._messages if message["role"] == "user"]
        note(f"(the last message is now: {left[-1]})" if left else "(the conversation is empty)")

    def _retry(self, _argument: str) -> bool | None:
        """Answers the last message again."""
        message = self._take_back()
        if message is None:
            note("(nothing to answer)")
            return None
        self._messages.append(message)
        return self._answer()

    def _save(self, argument: str) -> None:
        """Writes the conversation to a file: /save FILE, as JSON if it ends with .json, else as text."""
        if not argument:
            note("give a file: /save FILE")
            return
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._messages]
        if argument.endswith(".json"):
            text = json.dumps({"model": self._engine.model.path, "messages": messages}, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "\n\n".join(f"{message['role']}:\n{message['content']}" for message in messages) + "\n"
        path = Path(argument).expanduser()
        try:
            with written_whole(path) as partial:
                partial.write_text(text, encoding="utf-8")
        except OSError as error:
            note(f"error: {path}: {error.strerror}")
            return
        note(f"({len(messages)} messages written to {path})")

    def _stats(self, _argument: str) -> None:
        """Shows how full the context is, how quick the last answer was, and the memory used."""
        size = self._engine.context_size
        used = self._prompt_tokens() if self._messages else 0
        note(f"{len(self._messages)} messages, {len(self._messages) - self._first} of them in the context: {used} of {size} tokens")
        if (last := self._last) is not None:
            note(
                f"last answer: {len(last.tokens)} tokens at {last.timings.decode_tokens_per_second:.1f} tokens/s, the first after "
                f"{last.timings.time_to_first_token:.2f} s; {last.cached_tokens} of {last.prompt_tokens} prompt tokens were there already"
            )
        devices = ", ".join(f"{device} {format_size(bytes_)}" for device, bytes_ in self._engine.memory().by_device().items())
        note(f"memory: {devices}")

    def _take_back(self) -> dict[str, str] | None:
        """Removes the last message of the user's, and what follows it."""
        index = next((i for i in reversed(range(len(self._messages))) if self._messages[i]["role"] == "user"), None)
        if index is None:
            return None
        message = self._messages[index]
        del self._messages[index:]
        self._first = min(self._first, index)
        return message
