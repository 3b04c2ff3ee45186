"""What a vocabulary says about its tokens: text, kind, bytes, and which of them begin and end a text.

The kinds are GGUF's (`tokenizer.ggml.token_type`); a Hugging Face tokenizer is described in the same words. Bytes
are llama.cpp's `token_to_piece`. Turning text into tokens is not here (see the two `*_source` modules).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

SPACE_SYMBOL = "▁"
"""Stands for a space in SentencePiece vocabularies (U+2581)."""


class TokenKind(IntEnum):
    """Numbers of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_KINDS = frozenset({TokenKind.CONTROL, TokenKind.UNKNOWN})
"""Parsed in text only where asked for, and left out of generated text. User-defined tokens are neither."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the other bytes for U+0100 upwards, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return alphabet


BYTE_OF_CHAR = _byte_alphabet()


def byte_level_bytes(text: str) -> bytes:
    """Bytes of a byte-level BPE token; a character outside the alphabet (a faulty file) keeps its UTF-8 bytes."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in text])
    except KeyError:
        return b"".join(
            bytes([BYTE_OF_CHAR[char]]) if char in BYTE_OF_CHAR else char.encode("utf-8", "replace") for char in text
        )


def sentencepiece_bytes(text: str) -> bytes:
    """Bytes of a normal SentencePiece token."""
    return text.replace(SPACE_SYMBOL, " ").encode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id. `kinds` holds one `TokenKind` a byte; both have the same length, which may be less than the
    model's vocabulary (rows of padding)."""

    tokens: Sequence[str]
    kinds: bytes
    normal_bytes: Callable[[str], bytes]
    """`byte_level_bytes` or `sentencepiece_bytes`."""
    has_prefix_space: bool
    """Encoding puts a space before the text, so decoding from the start takes one away."""
    bos_id: int | None
    eos_id: int | None
    prefix_ids: tuple[int, ...]
    """What encoding with `add_special` puts before (BOS) and after (EOS) a text."""
    suffix_ids: tuple[int, ...]
    eog_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    """Texts for chat templates by transformers' names: "unk_token", "pad_token", ..., where the file names them."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for unused tokens and padding rows."""
        if not 0 <= token_id < len(self.tokens):
            return b""
        text, kind = self.tokens[token_id], self.kinds[token_id]
        if kind == TokenKind.NORMAL:
            return self.normal_bytes(text)
        if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED):
            return text.encode("utf-8", "replace")
        if kind == TokenKind.BYTE:  # "<0x0A>"
            return bytes([int(text[3:5], 16)])
        return b""

    def is_special(self, token_id: int) -> bool:
        """True for control and unknown tokens and for padding rows: never part of a generated text."""
        return not 0 <= token_id < len(self.kinds) or self.kinds[token_id] in SPECIAL_KINDS
