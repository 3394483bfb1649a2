"""The fenced code blocks of a Markdown page, and a program that runs them as a reader of the page would.

A comment on the line before a block changes what is done with it:

    <!-- not run: REASON -->                            for what needs another machine, a network or root
    <!-- needs NAME -->                                 it is run where there is a module or a program of that name
    <!-- runs until the end of the page: HOST:PORT -->   for a server: the next block runs when it listens there
"""

from __future__ import annotations

import contextlib
import doctest
import gc
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.waiting import eventually

__all__ = ["Block", "blocks_of", "with_stand_ins"]

_NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->\s*", re.DOTALL)
_BACKGROUND = re.compile(r"<!--\s*runs until the end of the page:\s*(\S+)\s*-->\s*")
_NEEDS = re.compile(r"<!--\s*needs (\w+)\s*-->\s*")
_KINDS: Mapping[str, Literal["python", "shell", "console", "text"]] = {
    "python": "python",
    "sh": "shell",
    "console": "console",
    "text": "text",
    "json": "text",
    "mermaid": "text",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: Python, a shell script, a shell session with its output, or text that is no code."""

    page: str
    line: int
    """Of its first line of code, from 1."""
    kind: Literal["python", "shell", "console", "text"]
    code: str
    not_run: str = ""
    """Why it is not run; empty: it is."""
    endpoint: str = ""
    """Where it listens, if it is a server."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path, page: str) -> list[Block]:
    """The blocks of a Markdown file, in order. A language that nothing is known of, or a block without one, is a ValueError."""
    return list(_blocks(MarkdownIt().parse(path.read_text(encoding="utf-8")), page))


def _blocks(tokens: Sequence[Token], page: str) -> Iterator[Block]:
    comment = ""
    for token in tokens:
        if token.type == "html_block":
            comment = token.content.strip()
            continue
        if token.type == "fence":
            assert token.map is not None
            line = token.map[0] + 2
            language = token.info.split()[0] if token.info.strip() else ""
            if language not in _KINDS:
                raise ValueError(f"{page}:{line}: a block of {language!r}; known are {', '.join(_KINDS)}")
            background = _BACKGROUND.fullmatch(comment)
            yield Block(
                page=page,
                line=line,
                kind=_KINDS[language],
                code=token.content,
                not_run=_reason(comment),
                endpoint=background.group(1) if background else "",
            )
        comment = ""


def _reason(comment: str) -> str:
    if marked := _NOT_RUN.fullmatch(comment):
        return marked.group(1)
    needs = _NEEDS.fullmatch(comment)
    there = needs is None or importlib.util.find_spec(needs.group(1)) is not None or shutil.which(needs.group(1)) is not None
    return "" if needs is None or there else f"{needs.group(1)} is not installed"


def with_stand_ins(block: Block, stand_ins: Mapping[str, str]) -> Block:
    """The block with what is written in the page, such as an address, replaced by what takes its place in the test."""
    fields = asdict(block)
    for written, real in stand_ins.items():
        fields |= {name: fields[name].replace(written, real) for name in ("code", "endpoint")}
    return Block(**fields)


# ---- the program: `python -m tests.support.code_blocks`, with the blocks as JSON on its standard input


def _run_all(blocks: Sequence[Block]) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for block in blocks:
            sys.stdout.flush()
            try:
                _run(block, namespace, servers)
            except BaseException:  # noqa: BLE001  # also SystemExit: no block ends the page
                sys.stdout.flush()
                traceback.print_exc()
                sys.stderr.write(f"\nThis block failed: {block}\n{block.code}")
                sys.exit(1)
    finally:
        # What still uses a server is closed before it ends.
        namespace.clear()
        gc.collect()
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


def _run(block: Block, namespace: dict[str, object], servers: list[subprocess.Popen[bytes]]) -> None:
    if block.kind == "python":
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)
    elif block.endpoint:
        servers.append(subprocess.Popen(["bash", "-e", "-c", f"exec {block.code}"], stdin=subprocess.DEVNULL))
        _wait_until_it_listens(block.endpoint, servers[-1])
    elif block.kind == "shell":
        subprocess.run(["bash", "-e", "-o", "pipefail", "-c", block.code], stdin=subprocess.DEVNULL, check=True)
    else:
        _run_session(block)


def _wait_until_it_listens(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    host, port = endpoint.rsplit(":", 1)

    def listens() -> bool:
        assert server.poll() is None, f"it ended with exit status {server.returncode}"
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False

    assert eventually(listens), f"nothing listens at {endpoint}"


def _run_session(block: Block) -> None:
    """Runs what follows each `$ ` and compares what it writes with the lines below it, where "..." stands for anything."""
    commands = re.split(r"^\$ ", block.code, flags=re.MULTILINE)
    assert not commands[0], "a console block begins with `$ `"
    for entry in commands[1:]:
        # A command goes on in the next line after a backslash.
        command, expected = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", entry, re.DOTALL).groups()  # type: ignore[union-attr]
        ran = subprocess.run(["bash", "-e", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if expected.strip() and not doctest.OutputChecker().check_output(expected, ran.stdout, options):
            raise AssertionError(f"`{command.strip()}` wrote\n{ran.stdout}")


if __name__ == "__main__":
    _run_all([Block(**fields) for fields in json.load(sys.stdin)])
