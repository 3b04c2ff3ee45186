"""Writes the committed tokenizer corpora: llama.cpp's token ids for the texts of `corpus_texts`.

    .venv/bin/python -m tests.server.text.make_corpus DEFAULT_MODEL.gguf

`tests/data/tokenizer_corpus.json`: the default model. `tests/data/tokenizer_corpus_small.json`: the small vocabularies,
the byte-level one under one name of every pre-tokenizer rule. llama-cpp-python lives in its own environment (see
`peer.py`); the test marked real_peer makes both again and compares.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.server.text import small_vocabularies
from tests.server.text.corpus_texts import TEXTS
from tests.server.text.peer import llamacpp_tokens

DATA = Path(__file__).parents[2] / "data"
DEFAULT_MODEL_CORPUS = DATA / "tokenizer_corpus.json"
SMALL_CORPUS = DATA / "tokenizer_corpus_small.json"
# fmt: off
RULES = (
    "default", "llama-bpe", "dbrx", "gpt-2", "smollm", "qwen2", "qwen35", "tekken", "gpt-4o", "minicpm5", "seed-coder",
    "jais-2", "bloom", "viking", "falcon", "deepseek-v3", "deepseek-coder", "deepseek-llm",
)
# fmt: on
"""One name of every list of patterns in `server.text.pretokenizers`."""


def default_model_corpus(model: Path) -> dict[str, str]:
    """Token ids by text, as words in a string: one line a text in the file."""
    answer = llamacpp_tokens(model, TEXTS)
    return {text: _words(ids) for text, ids in zip(TEXTS, answer["ids"], strict=True)}


def small_corpus() -> dict[str, Any]:
    """Merges and pieces of the small vocabularies, and for every text its token ids with the rules that give them."""
    merges = small_vocabularies.train_merges(TEXTS, 1200)
    pieces = small_vocabularies.train_pieces(TEXTS, 900)
    metadata = {rule: small_vocabularies.byte_level_metadata(rule, merges) for rule in RULES}
    metadata |= {
        f"llama:{prefix}": small_vocabularies.sentencepiece_metadata(pieces, add_space_prefix=prefix)
        for prefix in (True, False)
    }
    ids: list[dict[str, str]] = [{} for _ in TEXTS]
    with TemporaryDirectory() as folder:
        for name, fields in metadata.items():
            path = Path(folder) / "vocabulary.gguf"
            small_vocabularies.write_gguf(path, fields)
            for by_words, row in zip(ids, llamacpp_tokens(path, TEXTS, add_special=False)["ids"], strict=True):
                words = _words(row)
                by_words[words] = f"{by_words[words]} {name}" if words in by_words else name
    return {"merges": merges, "pieces": pieces, "texts": TEXTS, "ids": ids}


def _words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def main() -> None:
    small = small_corpus()
    for path, corpus in ((DEFAULT_MODEL_CORPUS, default_model_corpus(Path(sys.argv[1]))), (SMALL_CORPUS, small)):
        path.write_text(json.dumps(corpus, ensure_ascii=True, indent=0) + "\n")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
