"""Test helpers: a tiny byte-level tokenizer, and random walks through a grammar's masks."""

import random
from dataclasses import dataclass, field

import numpy as np

from server.tools.constraint import CompiledGrammar, ConstraintFactory, VocabularyTokenizer

_PIECES = (
    '{"',
    '": ',
    '", "',
    '"}',
    "}}",
    "\n",
    "name",
    "argu",
    "ments",
    "tool",
    "_call",
    "the",
    " the",
    "</",
    ' "',
    "é",
)


@dataclass
class TinyTokenizer:
    """256 byte tokens, some longer pieces, then special tokens; encodes greedily, specials spelled out."""

    specials: tuple[str, ...] = ("<end>", "<eot>")
    eog: tuple[str, ...] = ("<end>", "<eot>")
    tokens: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.num_plain = 256 + len(_PIECES)
        self.tokens = [bytes([i]) for i in range(256)] + [p.encode() for p in _PIECES]
        self.tokens += [s.encode() for s in self.specials]
        self.vocab_size = len(self.tokens) + 3  # padding, as in model files
        self.bos_token_id = None
        self.eog_token_ids = frozenset(self.num_plain + self.specials.index(text) for text in self.eog)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        assert not add_special
        assert not parse_special
        data, ids = text.encode(), []
        by_bytes = {token: i for i, token in enumerate(self.tokens[: self.num_plain])}
        while data:
            length = next(n for n in range(8, 0, -1) if data[:n] in by_bytes)
            ids.append(by_bytes[data[:length]])
            data = data[length:]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def is_special(self, token_id: int) -> bool:
        return token_id >= self.num_plain

    def token_to_id(self, text: str) -> int | None:
        return self.tokens.index(text.encode()) if text.encode() in self.tokens else None


def make_factory(tokenizer: VocabularyTokenizer, *, extra_words: int = 1) -> ConstraintFactory:
    """Masks one word longer than needed, as a padded vocabulary's are."""
    return ConstraintFactory(tokenizer, mask_words=-(-tokenizer.vocab_size // 32) + extra_words)


def allowed_ids(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(
    compiled: CompiledGrammar, tokenizer: VocabularyTokenizer, seed: int, *, max_tokens: int = 3000, mask_words: int
) -> str:
    """Text of a random answer inside the grammar, special tokens spelled out; what is forced on the way is checked.

    Ends at the first chance after `max_tokens / 4` tokens; prefers quotes and closing brackets so that it gets there.
    """
    rng = random.Random(seed)
    grammar = compiled.new()
    mask = np.zeros(mask_words, dtype=np.int32)
    data = b""
    forced: list[int] = []
    for step in range(max_tokens):
        mask.fill(-1)
        grammar.fill_mask(mask)
        ids = allowed_ids(mask)
        forced = forced or grammar.fork().forced_tokens()
        if forced:
            assert ids == [forced.pop(0)], "what is called forced is a choice"
        assert ids
        assert max(ids) < tokenizer.vocab_size
        ends = [token_id for token_id in ids if token_id in tokenizer.eog_token_ids]
        assert not ends or set(ends) == tokenizer.eog_token_ids
        assert grammar.is_finished() == (len(ends) == len(ids))
        if ends and (len(ends) == len(ids) or step > max_tokens // 4 or rng.random() < 0.1):
            assert grammar.advance(rng.choice(ends))
            grammar.fill_mask(mask)
            assert set(allowed_ids(mask)) == tokenizer.eog_token_ids
            return data.decode()
        ids = [token_id for token_id in ids if token_id not in tokenizer.eog_token_ids]
        closing = [token_id for token_id in ids if tokenizer.token_bytes(token_id)[:1] in (b'"', b"}", b"]")]
        token_id = rng.choice(closing if closing and rng.random() < 0.4 else ids)
        assert grammar.fork().take([token_id]) == 1
        assert grammar.advance(token_id)
        data += tokenizer.token_bytes(token_id)
    raise AssertionError(f"no end after {max_tokens} tokens: {data[-200:]!r}")
