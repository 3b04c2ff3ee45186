"""A tokenizer from the metadata of a GGUF file, built with the `tokenizers` library, equal to llama.cpp's.

`tokenizer.ggml.model` "gpt2" is byte-level BPE with the word pattern that `tokenizer.ggml.pre` names; "llama" is
SentencePiece-style BPE: the file has scores instead of merges, and the merges are derived from them. Other models
(bert, t5, rwkv, ...) are refused by name.

Equality with llama.cpp holds for text that is valid Unicode. Two things differ on purpose: a token id that the file
does not name is None, not llama.cpp's historic default (11 for "gpt2"); and text that merely spells a control token
("</s>" with `parse_special` off) never becomes it through merges.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers

from server.errors import ConfigError
from server.text import pretokenizers, score_merges, special_tokens
from server.text.vocabulary import (
    SPACE_SYMBOL,
    SPECIAL_KINDS,
    TokenKind,
    Vocabulary,
    byte_level_bytes,
    sentencepiece_bytes,
)


class GgufEncoder:
    """Text to token ids: splits at special tokens, then the library tokenizes what lies between."""

    def __init__(
        self, library: Tokenizer, vocabulary: Vocabulary, merger: score_merges.ScoreMerger | None = None
    ) -> None:
        self._library = library
        self._merger = merger  # replaces the library where that would not be exact
        self._vocabulary = vocabulary
        self._splitter = special_tokens.SpecialTokenSplitter(vocabulary.tokens, vocabulary.kinds)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids without BOS and EOS."""
        token_ids: list[int] = []
        after_special = True  # the start of the text counts as one
        for piece in self._splitter.split(text, parse_special=parse_special):
            if isinstance(piece, int):
                token_ids.append(piece)
                after_special = True
                continue
            if self._vocabulary.has_prefix_space and after_special:
                piece = " " + piece
            if self._merger is not None:
                token_ids += self._merger.tokenize(piece.replace(" ", SPACE_SYMBOL))
            else:
                # The batch call is the one that releases the GIL: other streams go on while a long text is tokenized.
                token_ids += self._library.encode_batch_fast([piece], add_special_tokens=False)[0].ids
            after_special = False
        return token_ids

    def token_to_id(self, text: str) -> int | None:
        return self._library.token_to_id(text)

    def library_json(self) -> str:
        """A `tokenizer.json` with the special tokens, for other libraries; takes about 0.1 s for 50,000 tokens."""
        document = json.loads(self._library.to_str())
        document["added_tokens"] = [
            {
                "id": token_id,
                "content": self._vocabulary.tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind in SPECIAL_KINDS,
            }
            for token_id, kind in enumerate(self._vocabulary.kinds)
            if kind in SPECIAL_KINDS or kind == TokenKind.USER_DEFINED
        ]
        return json.dumps(document, ensure_ascii=False)


def from_metadata(metadata: Mapping[str, Any]) -> tuple[GgufEncoder, Vocabulary]:
    """Encoder and vocabulary from every `tokenizer.*` key of a GGUF file, given without that prefix."""
    model = metadata.get("ggml.model")
    if model == "gpt2":
        return _byte_level(metadata)
    if model == "llama":
        return _sentencepiece(metadata)
    raise ConfigError(f"tokenizer.ggml.model {model!r} is not supported; supported: 'gpt2', 'llama'")


def _byte_level(metadata: Mapping[str, Any]) -> tuple[GgufEncoder, Vocabulary]:
    rule = pretokenizers.pre_tokenizer(metadata.get("ggml.pre"))
    tokens, ids_by_text = _tokens(metadata)
    merges = []
    # A repeated merge keeps its first rank, as in llama.cpp; the library would keep the last.
    for line in dict.fromkeys(_array(metadata, "ggml.merges")):
        left, _, right = line.partition(" ")
        if left + right not in ids_by_text or left not in ids_by_text or right not in ids_by_text:
            raise ConfigError(
                f"tokenizer.ggml.merges: {line!r} does not join two tokens of the vocabulary into a third"
            )
        merges.append((left, right))
    library = Tokenizer(models.BPE(ids_by_text, merges, ignore_merges=rule.ignore_merges))
    library.pre_tokenizer = pretokenizers.build(rule)
    library.decoder = decoders.ByteLevel()
    vocabulary = _vocabulary(
        metadata,
        tokens,
        ids_by_text,
        add_bos=rule.add_bos,
        bos_id=None,
        eos_id=None,
        is_byte_level=True,
    )
    return GgufEncoder(library, vocabulary), vocabulary


def _sentencepiece(metadata: Mapping[str, Any]) -> tuple[GgufEncoder, Vocabulary]:
    tokens, ids_by_text = _tokens(metadata)
    for byte in range(256):
        if f"<0x{byte:02X}>" not in ids_by_text:
            raise ConfigError(f"tokenizer.ggml.tokens: a 'llama' vocabulary without the byte token <0x{byte:02X}>")
    vocabulary = _vocabulary(metadata, tokens, ids_by_text, add_bos=True, bos_id=1, eos_id=2, is_byte_level=False)
    scores = _numbers(metadata, "ggml.scores", len(tokens), np.float32)
    merges, is_exact = score_merges.ranked_merges(tokens, vocabulary.kinds, scores, ids_by_text)
    library = Tokenizer(models.BPE(ids_by_text, merges, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", SPACE_SYMBOL)
    library.decoder = decoders.Sequence([decoders.Replace(SPACE_SYMBOL, " "), decoders.ByteFallback(), decoders.Fuse()])
    exact = None
    if not is_exact:
        exact = score_merges.ScoreMerger(tokens, vocabulary.kinds, scores, ids_by_text)
    return GgufEncoder(library, vocabulary, exact), vocabulary


def _vocabulary(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    ids_by_text: Mapping[str, int],
    *,
    add_bos: bool,
    bos_id: int | None,
    eos_id: int | None,
    is_byte_level: bool,
) -> Vocabulary:
    bos_id = _token_id(metadata, "bos_token_id", len(tokens), bos_id)
    eos_id = _token_id(metadata, "eos_token_id", len(tokens), eos_id)
    named = {stem: _token_id(metadata, f"{stem}_token_id", len(tokens)) for stem in special_tokens.NAMED_STEMS}
    named["eos"] = eos_id
    eog_ids, kinds = special_tokens.find(
        {stem: token_id for stem, token_id in named.items() if token_id is not None},
        ids_by_text,
        _kinds(metadata, tokens),
    )
    for_templates = {
        "bos_token": bos_id,
        "eos_token": eos_id,
        "unk_token": _token_id(metadata, "unknown_token_id", len(tokens)),
        "pad_token": _token_id(metadata, "padding_token_id", len(tokens)),
    }
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        normal_bytes=byte_level_bytes if is_byte_level else sentencepiece_bytes,
        has_prefix_space=not is_byte_level and bool(metadata.get("ggml.add_space_prefix", True)),
        bos_id=bos_id,
        eos_id=eos_id,
        prefix_ids=_added("bos", bool(metadata.get("ggml.add_bos_token", add_bos)), bos_id),
        suffix_ids=_added("eos", bool(metadata.get("ggml.add_eos_token", False)), eos_id),
        eog_ids=eog_ids,
        special_tokens={name: tokens[token_id] for name, token_id in for_templates.items() if token_id is not None},
    )


def _added(name: str, is_added: bool, token_id: int | None) -> tuple[int, ...]:
    if not is_added:
        return ()
    if token_id is None:
        raise ConfigError(f"tokenizer.ggml: a {name.upper()} token is to be added but {name}_token_id names none")
    return (token_id,)


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int, default: int | None = None) -> int | None:
    """An id outside the vocabulary (some files write 2**32 - 1 for "none") means the default, as in llama.cpp."""
    value = metadata.get(f"ggml.{key}")
    return int(value) if value is not None and 0 <= int(value) < num_tokens else default


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(_array(metadata, "ggml.tokens"))]
    ids_by_text = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids_by_text) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if ids_by_text[token] != token_id)
        raise ConfigError(f"tokenizer.ggml.tokens: {twice!r} occurs twice")
    return tokens, ids_by_text


def _kinds(metadata: Mapping[str, Any], tokens: Sequence[str]) -> bytes:
    if "ggml.token_type" not in metadata:
        return bytes([TokenKind.NORMAL]) * len(tokens)
    kinds = _numbers(metadata, "ggml.token_type", len(tokens), np.int32)
    known = (kinds >= TokenKind.UNDEFINED) & (kinds <= TokenKind.BYTE)
    for token_id in np.flatnonzero(kinds == TokenKind.BYTE).tolist():
        if len(tokens[token_id]) != 6 or not tokens[token_id].startswith("<0x"):
            raise ConfigError(f"tokenizer.ggml.tokens: byte token {tokens[token_id]!r} is not of the form <0x0A>")
    return np.where(known, kinds, TokenKind.UNDEFINED).astype(np.uint8).tobytes()


def _array(metadata: Mapping[str, Any], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if value is None:
        raise ConfigError(f"tokenizer.{key} is missing")
    return value


def _numbers(metadata: Mapping[str, Any], key: str, length: int, dtype: Any) -> np.ndarray:
    values = np.asarray(_array(metadata, key), dtype=dtype)
    if len(values) < length:
        raise ConfigError(f"tokenizer.{key} has {len(values)} entries for {length} tokens")
    return values[:length]
