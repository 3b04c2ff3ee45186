"""Tokenizer sources for tests: from plain metadata, and from a GGUF file through the `gguf` package."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from server.text.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Source:
    """What `quant.model_file.TokenizerSource` offers."""

    metadata: Mapping[str, Any]
    kind: str = "gguf"
    tokenizer_json: str | None = field(default=None, repr=False)


def tokenizer_from(metadata: Mapping[str, Any], vocab_size: int | None = None) -> Tokenizer:
    return build_tokenizer(Source(metadata), vocab_size or len(metadata["ggml.tokens"]))


def tokenizer_of_file(path: Path) -> Tokenizer:
    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer."
    return tokenizer_from({k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)})
