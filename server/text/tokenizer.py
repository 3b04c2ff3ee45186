"""The tokenizer of a served model: text to token ids and back.

Special tokens in text: completions and rendered chats are both encoded with `parse_special=True`, as llama.cpp's
server and vLLM do, so a prompt may spell "<|im_end|>" and mean the token; only /tokenize lets its caller choose.
BOS is put before a text that does not begin with it already, so a template that writes BOS itself gets one, not two.

Decoding concatenates the bytes of the tokens; nothing is cleaned up (no space removed before punctuation), so that
a stream and its whole are the same text. See `detokenizer` for the incremental twin.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from quant.model_types import TokenizerSource
from server.errors import ConfigError, InvalidRequestError
from server.text import gguf_source, hf_source
from server.text.vocabulary import Vocabulary


class Encoder(Protocol):
    """Text to token ids, without BOS and EOS."""

    def encode(self, text: str, *, parse_special: bool) -> list[int]: ...
    def token_to_id(self, text: str) -> int | None: ...
    def library_json(self) -> str: ...


class Tokenizer:
    """One vocabulary. Safe to use from several threads: nothing changes after construction but caches."""

    def __init__(
        self, encoder: Encoder, vocabulary: Vocabulary, vocab_size: int, chat_template_text: str | None
    ) -> None:
        if len(vocabulary.tokens) > vocab_size:
            raise ConfigError(f"the tokenizer has {len(vocabulary.tokens)} tokens but the model only {vocab_size}")
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._bytes: list[bytes | None] = [None] * vocab_size
        self.vocab_size = vocab_size
        """The model's: rows of padding beyond `num_tokens` have no text."""
        self.num_tokens = len(vocabulary.tokens)
        self.bos_token_id = vocabulary.bos_id
        self.eos_token_id = vocabulary.eos_id
        self.eog_token_ids = vocabulary.eog_ids
        self.add_bos = bool(vocabulary.prefix_ids)
        self.has_prefix_space = vocabulary.has_prefix_space
        self.special_tokens = dict(vocabulary.special_tokens)
        """For chat templates: "bos_token", "unk_token", ... where the model has them."""
        self.chat_template_text = chat_template_text
        self._longest_token_chars = max(map(len, vocabulary.tokens), default=1)

    def fewest_tokens(self, text: str) -> int:
        """At least so many tokens, found without tokenizing; far below the true number, for texts far too long.

        Not a bound for a Hugging Face tokenizer that drops runs of white space: 4 covers what NFC may compose.
        """
        return len(text) // (4 * self._longest_token_chars)

    @property
    def bos_token(self) -> str:
        """Text of BOS, '' if there is none; for chat templates."""
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        return self.special_tokens.get("eos_token", "")

    @cached_property
    def tokenizers_json(self) -> str:
        """A `tokenizer.json` of this vocabulary for llguidance; made when first asked for (see `library_json`)."""
        return self._encoder.library_json()

    @cached_property
    def digest(self) -> str:
        """Changes when any text could be tokenized or ended differently; made when first asked for."""
        facts = {
            "tokenizer": hashlib.sha256(self.tokenizers_json.encode()).hexdigest(),
            "kinds": self._vocabulary.kinds.hex(),
            "prefix_space": self.has_prefix_space,
            "prefix": self._vocabulary.prefix_ids,
            "suffix": self._vocabulary.suffix_ids,
            "end": sorted(self.eog_token_ids),
            "vocab_size": self.vocab_size,
        }
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; `add_special` puts the model's BOS before and EOS after it, neither twice."""
        token_ids = self._encode(text, parse_special)
        if not add_special:
            return token_ids
        prefix, suffix = list(self._vocabulary.prefix_ids), list(self._vocabulary.suffix_ids)
        if prefix and token_ids[: len(prefix)] != prefix:
            token_ids = prefix + token_ids
        if suffix and token_ids[-len(suffix) :] != suffix:
            token_ids += suffix
        return token_ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template: specials parsed, BOS once where the model wants it, never EOS."""
        token_ids = self._encode(rendered, True)
        prefix = list(self._vocabulary.prefix_ids)
        return prefix + token_ids if prefix and token_ids[: len(prefix)] != prefix else token_ids

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        try:
            text.encode()  # tokenizers only says that it wants a str
        except UnicodeEncodeError as error:  # JSON may carry "\ud800", which no UTF-8 has
            where = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
            raise InvalidRequestError(f"text is not valid Unicode: {where}") from None
        return self._encoder.encode(text, parse_special=parse_special)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True, at_start: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD.

        `at_start`: the ids begin a text, so the space that encoding put before it is dropped (SentencePiece only).
        """
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(f"token id {token_id} is not in 0..{self.vocab_size - 1}")
        data = b"".join(
            self.token_bytes(token_id) for token_id in token_ids if not (skip_special and self.is_special(token_id))
        )
        if at_start and self.has_prefix_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, its text for special tokens; perhaps a part of a UTF-8 character."""
        data = self._bytes[token_id]
        if data is None:
            data = self._bytes[token_id] = self._vocabulary.token_bytes(token_id)
        return data

    def is_special(self, token_id: int) -> bool:
        return self._vocabulary.is_special(token_id)

    def token_to_id(self, text: str) -> int | None:
        """The id of the token spelled so in the vocabulary's own writing ("Ġthe", "<|im_end|>")."""
        return self._encoder.token_to_id(text)


def build_tokenizer(source: TokenizerSource, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model file. Raises ConfigError naming the key that is missing, wrong or unsupported."""
    encoder: Encoder
    if source.kind == "gguf":
        encoder, vocabulary = gguf_source.from_metadata(source.metadata)
    else:
        encoder, vocabulary = hf_source.from_directory(source.tokenizer_json, source.metadata)
    return Tokenizer(encoder, vocabulary, vocab_size, _chat_template(source.metadata.get("chat_template")))


def _chat_template(value: Any) -> str | None:
    """The template's text; of several named ones (a list of {name, template}), "default"."""
    if value is None or isinstance(value, str):
        return value
    by_name = {entry["name"]: entry["template"] for entry in value}
    return by_name.get("default")
