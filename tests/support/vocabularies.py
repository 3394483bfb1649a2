"""Tokenizers for the tiny models: a byte-pair one and a SentencePiece one, both complete, of a few hundred tokens."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import gguf

__all__ = ["VOCABULARIES", "Token", "Vocabulary", "add_vocabulary"]

Vocabulary = Literal["bpe", "spm"]

# Pairs that are joined, earlier ones first; each part is a character or was joined before. "▁" stands for a space.
_PAIRS = (
    "▁+t h+e ▁+a i+n r+e o+n ▁t+he e+r ▁+s a+t o+r e+n ▁+w ▁+c i+s ▁+o e+s i+t ▁a+n ▁an+d in+g ▁o+f o+u ▁+p ▁+in e+d ▁+b ▁+m a+l ▁t+o "
    "▁+f l+l ▁+is o+w s+t ▁+d ▁+e ▁e+x p+er ▁ex+per ▁exper+t ▁expert+s"
)
_MERGES = tuple(pair.replace("+", " ") for pair in _PAIRS.split())
_PRINTABLE = range(0x20, 0x7F)
_QUIET, _SILENT = 0.5, 0.05


@dataclass(frozen=True)
class Token:
    text: str
    type: gguf.TokenType = gguf.TokenType.NORMAL
    loudness: float = 1.0
    """Factor on the token's logits: keeps greedy text mostly printable, and free of control tokens."""


def _byte_alphabet() -> tuple[str, ...]:
    """GPT-2's printable character for each byte: itself if it is one, else the next from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))


_ALPHABET = _byte_alphabet()


def _byte_pair_tokens() -> tuple[Token, ...]:
    letters = tuple(Token(text, loudness=1.0 if byte in _PRINTABLE else _QUIET) for byte, text in enumerate(_ALPHABET))
    words = tuple(Token(merge.replace(" ", "").replace("▁", _ALPHABET[0x20])) for merge in _MERGES)
    control = tuple(Token(text, gguf.TokenType.CONTROL, _SILENT) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return _padded(letters + words + control)


def _sentencepiece_tokens() -> tuple[Token, ...]:
    unknown = Token("<unk>", gguf.TokenType.UNKNOWN, _SILENT)
    control = tuple(Token(text, gguf.TokenType.CONTROL, _SILENT) for text in ("<s>", "</s>"))
    fallback = tuple(Token(f"<0x{byte:02X}>", gguf.TokenType.BYTE, _QUIET) for byte in range(256))
    words = tuple(Token(merge.replace(" ", "")) for merge in _MERGES)
    letters = tuple(Token("▁" if byte == 0x20 else chr(byte)) for byte in _PRINTABLE)
    return _padded((unknown, *control, *fallback, *words, *letters))


def _padded(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """Models round their vocabulary up with tokens that never occur."""
    missing = -len(tokens) % 32
    return tokens + tuple(Token(f"<|unused_{index}|>", gguf.TokenType.UNUSED, _SILENT) for index in range(missing))


VOCABULARIES: Mapping[Vocabulary, tuple[Token, ...]] = {"bpe": _byte_pair_tokens(), "spm": _sentencepiece_tokens()}


@functools.cache
def _words(kind: Vocabulary, count: int) -> tuple[str, ...]:
    """Words for a larger vocabulary: combinations of letters, of which each is a shorter one and a letter."""
    known = {token.text for token in VOCABULARIES[kind]}
    combinations = ("".join(letters) for size in (2, 3, 4) for letters in itertools.product(string.ascii_lowercase, repeat=size))
    return tuple(itertools.islice((word for word in combinations if word not in known), count))


def add_vocabulary(
    writer: gguf.GGUFWriter, kind: Vocabulary, *, size: int = 0, pre_tokenizer: str = "default", chat_template: str | None = None
) -> None:
    """Adds a tokenizer to a file. With a chat template, ``<|im_end|>`` ends a turn and no token starts a text.

    A `size` makes it that large, with words made of letters after the other tokens.
    """
    # llama.cpp looks for this token in models that are named Phi-3, whose vocabulary is the SentencePiece one and some control tokens.
    further = (Token("<|endoftext|>", gguf.TokenType.CONTROL, _SILENT),) if size and kind == "spm" else ()
    words = _words(kind, size - len(VOCABULARIES[kind]) - len(further)) if size else ()
    tokens = VOCABULARIES[kind] + further + tuple(Token(word) for word in words)
    ids = {token.text: index for index, token in enumerate(tokens)}
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_types([int(token.type) for token in tokens])
    if kind == "bpe":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer)
        merges = [merge.replace("▁", _ALPHABET[0x20]) for merge in _MERGES]
        writer.add_token_merges(merges + [f"{word[:-1]} {word[-1]}" for word in words])
        writer.add_bos_token_id(ids["<|endoftext|>"])
        writer.add_eos_token_id(ids["<|im_end|>" if chat_template else "<|endoftext|>"])
        writer.add_add_bos_token(chat_template is None)
    else:
        writer.add_tokenizer_model("llama")
        # The pair with the higher score is joined first.
        writer.add_token_scores([float(-index) for index in range(len(tokens))])
        writer.add_unk_token_id(ids["<unk>"])
        writer.add_bos_token_id(ids["<s>"])
        writer.add_eos_token_id(ids["</s>"])
        writer.add_add_bos_token(True)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
