"""Stop sequences, found in a text however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_moe.server.stop_sequences import StopFinder


def read(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    finder = StopFinder(stops)
    text = "".join(map(finder.push, pieces)) + finder.finish()
    return text, finder.found


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "abc", ("abc", None)),
        (["b"], "abc", ("a", "b")),
        (["x", "cd"], "abcdx", ("ab", "cd")),
        (["abcd", "bc"], "abcd", ("a", "bc")),  # complete first
        (["c", "bc"], "abc", ("a", "bc")),  # complete at once: the longest
        (["abd"], "abab", ("abab", None)),
        (["aab"], "aaab", ("a", "aab")),
    ],
)
def test_the_first_to_be_complete_ends_the_text(stops: list[str], text: str, expected: tuple[str, str | None]) -> None:
    assert read(stops, [text]) == expected
    assert read(stops, list(text)) == expected


def test_nothing_comes_after_the_end() -> None:
    finder = StopFinder(["b"])
    assert (finder.push("ab"), finder.push("ab"), finder.finish()) == ("a", "", "")


def test_only_what_may_be_a_stop_sequence_is_held_back() -> None:
    finder = StopFinder(["</end>"])
    assert [finder.push(piece) for piece in ("one", " <", "b> <", "/", "end")] == ["one", " ", "<b> ", "", ""]
    assert finder.finish() == "</end"


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("ab", max_size=3), max_size=8))
def test_the_text_does_not_depend_on_how_it_was_cut(stops: list[str], pieces: list[str]) -> None:
    assert read(stops, pieces) == read(stops, list("".join(pieces)))
    text, found = read(stops, pieces)
    whole = "".join(pieces)
    assert whole.startswith(text + (found or ""))
    assert found is not None or text == whole
