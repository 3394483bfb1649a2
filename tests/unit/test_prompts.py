from __future__ import annotations

import numpy as np
import pytest

from llama_moe.tokens import as_prompts, token_ids


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", "text"),
        ("", ""),
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (range(3), [0, 1, 2]),
        (np.array([1, 2]), [1, 2]),
        ([np.int32(4)], [4]),
    ],
)
def test_text_and_integers_are_one_prompt(prompt: object, expected: object) -> None:
    assert as_prompts(prompt) == ([expected], True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["text"], ["text"]),
        (("a", "b"), ["a", "b"]),
        (["a", [1, 2], np.array([3])], ["a", [1, 2], [3]]),
        ([[1]], [[1]]),
        ([[]], [[]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([[1], [3]]), [[1], [3]]),
        ([], []),
    ],
)
def test_sequences_of_those_are_several_prompts(prompts: object, expected: object) -> None:
    assert as_prompts(prompts) == (expected, False)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [None, 3, b"text", {"a": 1}, [1.5], [None], ["a", 1], [1, "a"], ["a", b"b"], np.array([1.5])])
def test_anything_else_is_refused(prompt: object) -> None:
    with pytest.raises(TypeError, match="token ids"):
        as_prompts(prompt)  # type: ignore[arg-type]


def test_token_ids_are_plain_integers() -> None:
    assert [type(item) for item in token_ids(np.array([1, 2], dtype=np.uint16))] == [int, int]
