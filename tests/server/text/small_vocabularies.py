"""Vocabularies small enough to commit and rich enough that a wrong word boundary changes the tokens.

The byte-level one merges across every kind of boundary (spaces, digits, newlines, scripts), because it is trained on
the corpus' texts uncut: only the pre-tokenizer keeps such merges from happening. The SentencePiece one has runs of
spaces, user-defined and control tokens, and characters that fall back to bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, models, trainers

from server.text.vocabulary import BYTE_OF_CHAR

CONTROL, USER_DEFINED, UNKNOWN, BYTE, NORMAL = 3, 4, 2, 6, 1
_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]


def train_merges(texts: Sequence[str], num_merges: int) -> list[str]:
    """Merges over GPT-2's byte alphabet, learned without any pre-tokenizer."""
    char_of = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    plain = [text for text in texts if "<|" not in text and "<think>" not in text]  # their pieces would be tokens twice
    encoded = ["".join(char_of[byte] for byte in text.encode()) for text in plain]
    library = Tokenizer(models.BPE())
    alphabet = sorted(BYTE_OF_CHAR)
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + num_merges, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    library.train_from_iterator(encoded * 2, trainer)
    merges = json.loads(library.to_str())["model"]["merges"]
    return [" ".join(pair) for pair in merges]


def byte_level_metadata(pre: str, merges: Sequence[str]) -> dict[str, Any]:
    """`tokenizer.*` keys, without the prefix, of a byte-level BPE vocabulary with these merges."""
    tokens = [*_SPECIALS, *sorted(BYTE_OF_CHAR), *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    tokens.append("<think>")
    kinds = [CONTROL] * 3 + [UNKNOWN] + [NORMAL] * (len(tokens) - 5) + [USER_DEFINED]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.merges": list(merges),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.add_bos_token": False,
    }


def sentencepiece_metadata(pieces: Sequence[str], *, add_space_prefix: bool = True) -> dict[str, Any]:
    """`tokenizer.*` keys of a SentencePiece-style vocabulary; earlier pieces have better scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|im_end|>", "[USER]"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), CONTROL, USER_DEFINED]
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces))] + [0.0, 0.0]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.scores": scores,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_bos_token": True,
        "ggml.add_space_prefix": add_space_prefix,
    }


def train_pieces(texts: Sequence[str], num_pieces: int) -> list[str]:
    """Pieces by merge order, then runs of spaces, then the single characters they are made of."""
    library = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=num_pieces, limit_alphabet=220, show_progress=False, max_token_length=10)
    library.train_from_iterator([text.replace(" ", "▁") for text in texts] * 2, trainer)
    model = json.loads(library.to_str())["model"]
    joined = ["".join(pair) for pair in model["merges"]]
    runs = ["▁" * length for length in (2, 3, 4, 5, 7, 8, 16)]
    single = sorted({char for piece in joined for char in piece} | {"▁"})
    specials = {"<s>", "</s>", "<unk>", "<|im_end|>", "[USER]"}
    return [piece for piece in dict.fromkeys([*runs[:3], *joined, *runs[3:], *single]) if piece not in specials]


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    """A vocabulary-only file that llama.cpp loads with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        name = f"tokenizer.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
