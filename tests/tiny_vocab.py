"""Small vocabularies for tests: byte-level BPE (GPT-2 style) and SentencePiece style, trained here on a paragraph.

Deterministic and without the `tokenizers` library, so that a tiny model file never depends on what it tests.
Three special tokens come first (ids 0-2), then the 256 bytes, then what the merges make.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # GGUF token types
_TEXT = """The quick brown fox jumps over the lazy dog. When the history of the world is written, the words that were
said in the morning are often not the words that are read in the evening. There is nothing in the house, she said, and
then he went to the river with the other children and asked them what they had seen. A model answers the question of the
user with a call to a tool: get the weather in the capital of France, and return the temperature as a number. The answer
is that one thing and another thing are the same thing. The function takes an input and gives an output; in the end all
of it is a list of numbers. We were there for an hour, and the rain never came."""


@dataclass(frozen=True)
class TinyVocab:
    """Tokens in id order, their GGUF types, and merges ("left right") or scores, whichever the style has."""

    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(b for b in range(256) if b not in table):
        table[byte] = chr(256 + offset)
    return table


def _train_merges(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            raise ValueError(f"the training text only gives {len(merges)} merges, not {count}")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            pieces: list[str] = []
            for piece in word:
                if pieces and (pieces[-1], piece) == best:
                    pieces[-1] += piece
                else:
                    pieces.append(piece)
            merged[tuple(pieces)] += times
        words = merged
    return merges


@cache
def byte_level_vocab(vocab_size: int = 384) -> TinyVocab:
    """GPT-2 style: special tokens, the 256 byte characters, merged tokens."""
    table = byte_to_char()
    alphabet = [table[byte] for byte in range(256)]
    words = Counter(
        tuple(table[byte] for byte in (word if i == 0 else " " + word).encode())
        for line in _TEXT.splitlines()
        for i, word in enumerate(line.split())
    )
    merges = _train_merges(words, vocab_size - len(SPECIAL_TOKENS) - len(alphabet))
    tokens = (*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in merges))
    types = tuple(_CONTROL if i < len(SPECIAL_TOKENS) else _NORMAL for i in range(len(tokens)))
    assert len(set(tokens)) == len(tokens)
    return TinyVocab(tokens, types, merges=tuple(f"{left} {right}" for left, right in merges))


@cache
def sentencepiece_vocab(vocab_size: int = 384) -> TinyVocab:
    """Llama-2 style: <unk>, <s>, </s>, 256 byte tokens, characters and pieces with scores (earlier merge, higher)."""
    words = Counter(tuple("\u2581" + word) for word in _TEXT.split())
    characters = sorted({character for word in words for character in word})
    special = ("<unk>", "<s>", "</s>")
    byte_tokens = tuple(f"<0x{byte:02X}>" for byte in range(256))
    merges = _train_merges(words, vocab_size - len(special) - len(byte_tokens) - len(characters))
    pieces = tuple(left + right for left, right in merges)
    tokens = (*special, *byte_tokens, *pieces, *characters)
    types = (_UNKNOWN, _CONTROL, _CONTROL, *([_BYTE] * 256), *([_NORMAL] * (len(pieces) + len(characters))))
    scores = (*([0.0] * (len(special) + 256)), *(-float(i) for i in range(len(pieces) + len(characters))))
    assert len(set(tokens)) == len(tokens)
    return TinyVocab(tokens, types, scores=scores)
