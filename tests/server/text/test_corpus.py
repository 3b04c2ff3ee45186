"""Token ids equal llama.cpp's, over the committed corpora and, where it is installed, over random text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from server.text import pretokenizers
from server.text.tokenizer import Tokenizer
from tests.server.text import make_corpus, small_vocabularies
from tests.server.text.corpus_texts import TEXTS
from tests.server.text.peer import llamacpp_tokens
from tests.server.text.vocabulary_files import tokenizer_from, tokenizer_of_file

_SMALL: dict[str, Any] = json.loads(make_corpus.SMALL_CORPUS.read_text())
_NAMES = [*make_corpus.RULES, "llama:True", "llama:False"]
# What word patterns treat differently, thick on the ground.
_CHARACTERS = (
    " \t\n\r'\"’.,!?-_/\\()[]{}<>$+=^~|`#@&*;:%…。，、aAsStTrReEvVmMlLdDzéÉßñжЖλΛ日本あア한글ﾊａＡ0123456789½²٣Ⅳ１"
    "\u0301\u093f👍🏽\u200d\u00a0\u3000\u2003\u2028\u0085\u000b\x00ſK̈İαǅʰªº٬۔،।"
)


def _metadata(name: str) -> dict[str, Any]:
    if name.startswith("llama:"):
        return small_vocabularies.sentencepiece_metadata(_SMALL["pieces"], add_space_prefix=name == "llama:True")
    return small_vocabularies.byte_level_metadata(name, _SMALL["merges"])


def _expected(name: str) -> list[list[int]]:
    rows = []
    for by_words in _SMALL["ids"]:
        words = next(words for words, names in by_words.items() if name in names.split())
        rows.append([int(word) for word in words.split()])
    return rows


def _encode(tokenizer: Tokenizer, texts: list[str], *, add_special: bool = False) -> list[list[int]]:
    return [tokenizer.encode(text, add_special=add_special, parse_special=True) for text in texts]


def _random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        size = rng.randrange(1, 40)
        texts.append(
            "".join(rng.choice(_CHARACTERS) if rng.random() < 0.6 else rng.choice(" 's1a\n") for _ in range(size))
        )
    texts += [" " * n + end for n in range(1, 60) for end in ("", "x", "\n")] + ["1" * n for n in range(1, 20)]
    return texts


def test_the_corpus_has_these_texts() -> None:
    assert _SMALL["texts"] == TEXTS
    assert list(json.loads(make_corpus.DEFAULT_MODEL_CORPUS.read_text())) == TEXTS


def test_the_corpus_covers_every_rule() -> None:
    covered = {pretokenizers.pre_tokenizer(name).patterns for name in make_corpus.RULES}
    assert covered == {pretokenizers.pre_tokenizer(name).patterns for name in pretokenizers.known_names()}


def test_no_two_rules_agree_on_the_corpus() -> None:
    """Otherwise a pattern could be wrong and go unnoticed. `dbrx` differs from `llama-bpe` in ignoring no merges."""
    rows = {name: json.dumps(_expected(name)) for name in make_corpus.RULES if name != "dbrx"}
    assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize("name", _NAMES)
def test_small_vocabulary_equals_llamacpp(name: str) -> None:
    tokenizer = tokenizer_from(_metadata(name))
    for text, mine, theirs in zip(TEXTS, _encode(tokenizer, TEXTS), _expected(name), strict=True):
        assert mine == theirs, text


@pytest.mark.parametrize("name", _NAMES)
def test_decoding_gives_the_text_back(name: str) -> None:
    tokenizer = tokenizer_from(_metadata(name))
    for text, ids in zip(TEXTS, _encode(tokenizer, TEXTS), strict=True):
        if not (name == "llama:True" and "<|im_end|>" in text) and "▁" not in text:  # a space follows each special
            assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.real_model
def test_default_model_equals_llamacpp(default_model: Path) -> None:
    tokenizer = tokenizer_of_file(default_model)
    for text, words in json.loads(make_corpus.DEFAULT_MODEL_CORPUS.read_text()).items():
        ids = tokenizer.encode(text, add_special=True, parse_special=True)
        assert ids == [int(word) for word in words.split()], text
        assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.real_peer
@pytest.mark.real_model
def test_default_model_corpus_is_what_llamacpp_says(default_model: Path) -> None:
    assert make_corpus.default_model_corpus(default_model) == json.loads(make_corpus.DEFAULT_MODEL_CORPUS.read_text())


@pytest.mark.real_peer
@pytest.mark.real_model
def test_default_model_equals_llamacpp_on_random_text(default_model: Path) -> None:
    tokenizer, texts = tokenizer_of_file(default_model), _random_texts(1, 1000)
    answer = llamacpp_tokens(default_model, texts)
    assert _encode(tokenizer, texts, add_special=True) == answer["ids"]
    assert tokenizer.eog_token_ids == frozenset(answer["eog"])
    assert [tokenizer.token_bytes(i).hex() for i in range(tokenizer.vocab_size)] == answer["pieces"]


@pytest.mark.real_peer
@pytest.mark.parametrize("name", [*sorted(pretokenizers.known_names()), "llama:True", "llama:False"])
def test_random_text_equals_llamacpp(name: str, tmp_path: Path) -> None:
    metadata = _metadata(name)
    path = tmp_path / "vocabulary.gguf"
    small_vocabularies.write_gguf(path, metadata)
    tokenizer, texts = tokenizer_from(metadata), TEXTS + _random_texts(2, 500)
    answer = llamacpp_tokens(path, texts, add_special=False)
    for text, mine, theirs in zip(texts, _encode(tokenizer, texts), answer["ids"], strict=True):
        assert mine == theirs, text
    assert tokenizer.eog_token_ids == frozenset(answer["eog"])
    assert [tokenizer.token_bytes(i).hex() for i in range(tokenizer.vocab_size)] == answer["pieces"]


@pytest.mark.real_peer
@pytest.mark.parametrize("seed", range(4))
def test_shuffled_and_tied_scores_equal_llamacpp(seed: int, tmp_path: Path) -> None:
    """Scores that no training gives: random order, runs of spaces anywhere, and ties."""
    rng = random.Random(seed)
    pieces = [piece for piece in _SMALL["pieces"] if set(piece) != {"▁"} and len(piece) > 1]
    runs = ["▁" * length for length in range(2, 20)]
    rng.shuffle(pieces)
    rng.shuffle(runs)
    single = sorted({char for piece in pieces for char in piece} | {"▁"})
    metadata = small_vocabularies.sentencepiece_metadata([*runs, *pieces, *single])
    if seed % 2:
        metadata["ggml.scores"] = [-float(index // 7) for index in range(len(metadata["ggml.tokens"]))]
    path = tmp_path / "vocabulary.gguf"
    small_vocabularies.write_gguf(path, metadata)
    texts = TEXTS + _random_texts(seed, 500)
    theirs = llamacpp_tokens(path, texts, add_special=False)["ids"]
    assert _encode(tokenizer_from(metadata), texts) == theirs
