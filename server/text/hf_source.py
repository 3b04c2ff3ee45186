"""A tokenizer from a Hugging Face directory: `tokenizer.json` as the `tokenizers` library reads it.

The library is the reference here, special tokens, normalizer and post-processor included. `tokenizer_config.json`
adds the names of BOS and EOS and may switch them (`add_bos_token`), `generation_config.json` the end tokens. Only
byte-level and SentencePiece-style decoders are served, since the others do not map each token to fixed bytes.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from server.errors import ConfigError
from server.text import special_tokens
from server.text.vocabulary import (
    SPACE_SYMBOL,
    TokenKind,
    Vocabulary,
    byte_level_bytes,
    sentencepiece_bytes,
)

_TEMPLATE_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


class HfEncoder:
    """Text to token ids by the library alone."""

    def __init__(self, text: str, library: Tokenizer) -> None:
        self._text = text
        self._library = library

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer, blind to special tokens in the text; built when first asked for (0.1 s and more)."""
        library = Tokenizer.from_str(self._text)
        library.encode_special_tokens = True
        return library

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids without BOS and EOS."""
        library = self._library if parse_special else self._plain
        # The batch call is the one that releases the GIL: other streams go on while a long text is tokenized.
        return library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def token_to_id(self, text: str) -> int | None:
        return self._library.token_to_id(text)

    def library_json(self) -> str:
        return self._text


def from_directory(tokenizer_json: str | None, metadata: Mapping[str, Any]) -> tuple[HfEncoder, Vocabulary]:
    """Encoder and vocabulary; `metadata` is tokenizer_config.json with "generation_config" put in."""
    if tokenizer_json is None:
        raise ConfigError("the model directory has no tokenizer.json")
    try:
        library = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a bad file
        raise ConfigError(f"tokenizer.json: {error}") from None
    library.no_truncation()
    library.no_padding()
    ids_by_text = library.get_vocab(with_added_tokens=True)
    tokens = [""] * (max(ids_by_text.values()) + 1)
    for token, token_id in ids_by_text.items():
        tokens[token_id] = token
    normal_bytes, has_prefix_space = _decoding(library)
    generation = metadata.get("generation_config") or {}
    ends = generation.get("eos_token_id")
    ends = {int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None and 0 <= i < len(tokens)}
    bos_id, eos_id = (_named(metadata, ids_by_text, name) for name in ("bos", "eos"))
    named = {} if eos_id is None else {"eos": eos_id}
    known, kinds = special_tokens.find(named, ids_by_text, _kinds(library, tokens, normal_bytes is byte_level_bytes))
    prefix_ids, suffix_ids = _added(library, metadata, bos_id, eos_id)
    vocabulary = Vocabulary(
        tokens=tokens,
        kinds=kinds,
        normal_bytes=normal_bytes,
        has_prefix_space=has_prefix_space,
        bos_id=bos_id,
        eos_id=eos_id,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        eog_ids=known | ends,
        special_tokens={name: text for name in _TEMPLATE_NAMES if (text := _text(metadata.get(name))) is not None},
    )
    return HfEncoder(tokenizer_json, library), vocabulary


def _decoding(library: Tokenizer) -> tuple[Any, bool]:
    """How a normal token's text becomes bytes, and whether decoding drops one leading space."""
    state = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return byte_level_bytes, False
    if "Metaspace" in kinds or {"Replace", "ByteFallback"} <= kinds:
        drops_space = any(
            (step.get("type") == "Strip" and step.get("content") == " " and step.get("start") == 1)
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        return sentencepiece_bytes, drops_space
    raise ConfigError(
        f"tokenizer.json: decoder {state.get('type')!r} is not supported; supported: ByteLevel, Metaspace,"
        f" Sequence of Replace({SPACE_SYMBOL!r}), ByteFallback, Fuse, Strip"
    )


def _kinds(library: Tokenizer, tokens: list[str], is_byte_level: bool) -> bytes:
    kinds = bytearray([TokenKind.NORMAL]) * len(tokens)
    for token_id, token in enumerate(tokens):
        if not token:
            kinds[token_id] = TokenKind.UNUSED  # a hole in the numbering
        elif not is_byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[token_id] = TokenKind.BYTE
    for token_id, added in library.get_added_tokens_decoder().items():
        kinds[token_id] = TokenKind.CONTROL if added.special else TokenKind.USER_DEFINED
    return bytes(kinds)


def _text(token: Any) -> str | None:
    """A special token is written as a string or as the dictionary of an added token."""
    return token.get("content") if isinstance(token, Mapping) else token


def _named(metadata: Mapping[str, Any], ids_by_text: Mapping[str, int], name: str) -> int | None:
    """The id of `bos_token` or `eos_token`."""
    token = _text(metadata.get(f"{name}_token"))
    if token is None:
        return None
    if token not in ids_by_text:
        raise ConfigError(f"tokenizer_config.json: {name}_token {token!r} is not in tokenizer.json")
    return ids_by_text[token]


def _added(
    library: Tokenizer, metadata: Mapping[str, Any], bos_id: int | None, eos_id: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts around a text, unless `add_bos_token` or `add_eos_token` says otherwise."""
    bare = library.encode("a", add_special_tokens=False).ids
    full = library.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    around = [tuple(full[:start]), tuple(full[start + len(bare) :])]
    for side, (name, token_id) in enumerate((("bos", bos_id), ("eos", eos_id))):
        wanted = metadata.get(f"add_{name}_token")
        if isinstance(wanted, bool) and token_id is not None:
            around[side] = (token_id,) if wanted else ()
    return around[0], around[1]
