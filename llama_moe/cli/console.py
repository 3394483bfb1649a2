"""What the commands have in common: exit codes, progress, streaming to the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from typing import TYPE_CHECKING

import typer

from llama_moe import ChatDelta
from llama_moe.errors import LlamaMoeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from llama_moe import ChatStream, TokenStream

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_PROGRESS_STEPS = 1000


def note(message: str = "") -> None:
    """Writes a line to standard error."""
    typer.echo(message, err=True)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the program with one line on standard error for a failure that a user can have caused; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        note()
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        raise  # the reader of our output has gone: typer ends quietly
    except (LlamaMoeError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            message = f"{error.filename}: {error.strerror}"
        note("error: " + "; ".join(message.splitlines()))
        raise typer.Exit(EXIT_FAILURE) from None


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, if that is a terminal; gives the function to call with the share done, 0 to 1."""
    if not sys.stderr.isatty():
        yield lambda _share: None
        return
    done = 0
    with typer.progressbar(length=_PROGRESS_STEPS, label=label, file=sys.stderr) as bar:

        def advance(share: float) -> None:
            nonlocal done
            steps = int(share * _PROGRESS_STEPS) - done
            if steps > 0:
                bar.update(steps)
                done += steps

        yield advance


def stream_to_stdout(started: TokenStream | ChatStream) -> None:
    """Writes the text to standard output as it comes; the reasoning of an answer, and then how quick it was, to standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    begin = time.perf_counter()
    with started as stream:
        for piece in stream:
            if isinstance(piece, ChatDelta):
                sys.stderr.write(piece.reasoning)
                sys.stderr.flush()
            sys.stdout.write(str(piece))
            sys.stdout.flush()
    seconds = time.perf_counter() - begin
    sys.stdout.write("\n")
    sys.stdout.flush()
    completion = stream.completion
    timings = completion.timings
    note(
        f"{len(completion.tokens)} tokens in {seconds:.2f} s, {timings.decode_tokens_per_second:.1f} tokens/s; "
        f"first token after {timings.time_to_first_token:.2f} s; "
        f"prompt of {completion.prompt_tokens} tokens at {timings.prompt_tokens_per_second:.1f} tokens/s"
    )


def check_one_of(reason: str, options: Mapping[str, bool]) -> None:
    """More than one of these options is a usage error."""
    given = [option for option, is_given in options.items() if is_given]
    if len(given) > 1:
        raise typer.BadParameter(f"{reason}; give only one of them", param_hint=" and ".join(given))


def regex_rules(texts: Sequence[str], what: str, option: str) -> list[tuple[str, str]]:
    """The two sides of each REGEX=`what` that was given; anything else is a usage error."""
    rules = []
    for text in texts:
        regex, _, value = text.rpartition("=")
        if not (regex and value):
            raise typer.BadParameter(f"{text!r} is not REGEX={what}", param_hint=option)
        rules.append((regex, value))
    return rules


def text_of(path: Path, option: str) -> str:
    """The text of a file; one that cannot be read is a usage error."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{str(path)!r} cannot be read: {error.strerror}", param_hint=option) from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{str(path)!r} is not text in UTF-8", param_hint=option) from None
