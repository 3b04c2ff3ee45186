"""A Hugging Face tokenizer written into a GGUF file is the same tokenizer there, or is refused."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from quant.model_types import TokenizerSource
from server.errors import ConfigError
from server.text import pretokenizers
from server.text.gguf_export import gguf_tokenizer_metadata
from server.text.tokenizer import Tokenizer as OurTokenizer
from server.text.tokenizer import build_tokenizer
from tests.server.text.corpus_texts import TEXTS
from tests.server.text.test_hf_source import _byte_level_library, _sentencepiece_library

VOCAB_SIZE = 5000


def both(library: Tokenizer, **metadata: Any) -> tuple[OurTokenizer, OurTokenizer, dict[str, Any]]:
    """As it is, as the GGUF file has it, and the file's metadata."""
    source = TokenizerSource("hf", metadata, library.to_str())
    written = gguf_tokenizer_metadata(source, VOCAB_SIZE)
    without = {key.removeprefix("tokenizer."): value for key, value in written.items()}
    return build_tokenizer(source, VOCAB_SIZE), build_tokenizer(TokenizerSource("gguf", without), VOCAB_SIZE), written


@pytest.mark.parametrize("make", [_byte_level_library, _sentencepiece_library])
def test_the_same_tokens_for_the_same_texts(make: Any) -> None:
    library = make()
    if make is _byte_level_library:
        library.normalizer = None  # NFC has no form in a GGUF file
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"} if make is _sentencepiece_library else {}
    ours, theirs, metadata = both(library, **special, chat_template="T")
    assert len(metadata["tokenizer.ggml.tokens"]) == VOCAB_SIZE
    assert theirs.chat_template_text == "T"
    assert theirs.add_bos is ours.add_bos
    assert theirs.eog_token_ids == ours.eog_token_ids
    for text in TEXTS:
        ids = ours.encode(text, add_special=True, parse_special=True)
        assert theirs.encode(text, add_special=True, parse_special=True) == ids
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2", "gpt-4o", "tekken", "deepseek-v3", "qwen35"])
def test_the_pre_tokenizer_is_found_by_what_it_does(pre: str) -> None:
    library = _byte_level_library()
    library.normalizer = None
    rule = pretokenizers.pre_tokenizer(pre)
    library.pre_tokenizer = pretokenizers.build(rule)
    library.model.ignore_merges = rule.ignore_merges
    found = both(library)[2]["tokenizer.ggml.pre"]
    assert pretokenizers.pre_tokenizer(found).patterns == rule.patterns


def test_ends_that_only_generation_config_names_are_kept() -> None:
    library = _byte_level_library()
    ours, theirs, metadata = both(library, eos_token="<|im_end|>", generation_config={"eos_token_id": [5, 6]})
    assert {metadata["tokenizer.ggml.eot_token_id"], metadata["tokenizer.ggml.eom_token_id"]} == {5, 6}
    assert theirs.eog_token_ids == ours.eog_token_ids
    with pytest.raises(ConfigError, match="cannot name so many ends of a generation"):
        both(library, generation_config={"eos_token_id": [5, 6, 7]})


def test_what_has_no_form_there_is_refused() -> None:
    library = _byte_level_library()
    library.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="a normalizer of type 'Lowercase'"):
        both(library)
    library = _byte_level_library()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ConfigError, match="cuts text into words in a way"):
        both(library)
    library = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    library.decoder = _byte_level_library().decoder
    with pytest.raises(ConfigError, match="a model of type 'WordLevel'"):
        both(library)
    with pytest.raises(ConfigError, match="chat templates a, b, none of them named default"):
        both(_byte_level_library(), chat_template=[{"name": "a", "template": "x"}, {"name": "b", "template": "y"}])


def test_a_tokenizer_that_would_be_another_is_refused() -> None:
    library = _byte_level_library()
    library.normalizer = None
    library.add_tokens([AddedToken("2024", normalized=False, lstrip=True)])  # takes the space before it
    with pytest.raises(ConfigError, match=r"it would tokenize .Hello, world"):
        both(library)
