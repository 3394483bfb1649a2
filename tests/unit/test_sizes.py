from __future__ import annotations

import numpy as np
import pytest

from llama_moe._sizes import format_size, parse_size
from llama_moe.errors import InvalidOptionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("0.29kB", 290),
        (" 2 tib ", 2 * 2**40),
        ("1KiB", 1024),
        ("17B", 17),
        ("0GiB", 0),
    ],
)
def test_text_with_a_unit_is_a_size(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("number", [0, 1, 2**50, np.int64(12), np.uint8(7)])
def test_an_integer_is_a_size_in_bytes(number: int) -> None:
    size = parse_size(number)
    assert size == number
    assert type(size) is int


@pytest.mark.parametrize("text", ["", "8", "8G", "GiB", "-1GiB", "1,5GB", "1e3MB", "8GiBs", "8 iB", "٣GiB"])
def test_other_text_is_refused_with_the_option_and_an_example(text: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"^vram: .* is not a size; expected .*'8GiB'") as caught:
        parse_size(text, "vram")
    assert repr(text) in str(caught.value)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"^ram: -1 is negative"):
        parse_size(-1, "ram")


@pytest.mark.parametrize("value", [None, 1.5, True, b"8GiB", [1]])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="size must be bytes as an int"):
        parse_size(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20 // 2, "1.5 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5120.00 GiB"),
    ],
)
def test_a_size_is_written_in_the_largest_fitting_unit(size: int, expected: str) -> None:
    assert format_size(size) == expected
