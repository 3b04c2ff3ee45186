"""Tokenizers for tests: from plain metadata, and from a model file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.model_file import open_model
from quant.model_types import TokenizerSource
from server.text.tokenizer import Tokenizer, build_tokenizer


def tokenizer_from(metadata: Mapping[str, Any], vocab_size: int | None = None) -> Tokenizer:
    return build_tokenizer(TokenizerSource("gguf", metadata), vocab_size or len(metadata["ggml.tokens"]))


def tokenizer_of_file(path: Path) -> Tokenizer:
    model = open_model(path)
    try:
        return build_tokenizer(model.tokenizer, model.config.vocab_size)
    finally:
        model.close()
