"""Tokenizers from a Hugging Face directory do what the `tokenizers` library does with the same tokenizer.json."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quant.model_types import TokenizerSource
from server.errors import ConfigError
from server.text import tokenizer as text_tokenizer
from server.text.detokenizer import Detokenizer
from server.text.vocabulary import BYTE_OF_CHAR
from tests.server.text import make_corpus, small_vocabularies
from tests.server.text.corpus_texts import TEXTS

_SMALL: dict[str, Any] = json.loads(make_corpus.SMALL_CORPUS.read_text())


def _byte_level_library() -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _SMALL["merges"]]
    tokens = [*sorted(BYTE_OF_CHAR), *dict.fromkeys(left + right for left, right in merges)]
    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return library


def _sentencepiece_library() -> Tokenizer:
    metadata = small_vocabularies.sentencepiece_metadata(_SMALL["pieces"])
    library = Tokenizer.from_str(
        text_tokenizer.build_tokenizer(TokenizerSource("gguf", metadata), 5000).tokenizers_json
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def _build(library: Tokenizer, **metadata: Any) -> text_tokenizer.Tokenizer:
    return text_tokenizer.build_tokenizer(TokenizerSource("hf", metadata, library.to_str()), 5000)


@pytest.mark.parametrize("make", [_byte_level_library, _sentencepiece_library])
def test_equals_the_library(make: Any) -> None:
    library = make()
    tokenizer = _build(library, bos_token="<s>" if make is _sentencepiece_library else None)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert ids == library.encode(text, add_special_tokens=False).ids
        prefix = [1] if tokenizer.add_bos and ids[:1] != [1] else []
        assert tokenizer.encode(text, add_special=True, parse_special=True) == prefix + ids
        for skip_special in (True, False):
            assert tokenizer.decode(ids, skip_special=skip_special) == library.decode(
                ids, skip_special_tokens=skip_special
            )
        detokenizer = Detokenizer(tokenizer, at_start=True)
        assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == tokenizer.decode(ids)


def test_special_tokens_are_parsed_only_where_asked_for() -> None:
    tokenizer = _build(_byte_level_library())
    end = tokenizer.token_to_id("<|im_end|>")
    think = tokenizer.token_to_id("<think>")
    assert end in tokenizer.encode("a<|im_end|>", add_special=False, parse_special=True)
    plain = tokenizer.encode("a<|im_end|><think>", add_special=False, parse_special=False)
    assert end not in plain
    assert think in plain
    assert tokenizer.decode(plain) == "a<|im_end|><think>"


def test_bos_comes_once_and_can_be_switched() -> None:
    library = _sentencepiece_library()
    tokenizer = _build(library, bos_token="<s>", eos_token={"content": "</s>"})
    assert tokenizer.add_bos
    for text in ("a", "<s>a"):
        ids = tokenizer.encode(text, add_special=True, parse_special=True)
        assert ids[0] == 1
        assert 1 not in ids[1:]
    assert not _build(library, bos_token="<s>", add_bos_token=False).add_bos
    assert _build(_byte_level_library(), bos_token="<|im_start|>", add_bos_token=True).add_bos
    assert tokenizer.eos_token == "</s>"


def test_end_tokens_come_from_three_places() -> None:
    library = _byte_level_library()
    tokenizer = _build(library, eos_token="<|im_end|>", generation_config={"eos_token_id": [5, 6]})
    end_of_text = library.token_to_id("<|endoftext|>")
    assert tokenizer.eog_token_ids == {library.token_to_id("<|im_end|>"), 5, 6, end_of_text}
    assert 7 in _build(library, generation_config={"eos_token_id": 7}).eog_token_ids


def test_template_of_several_is_the_default_one() -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert _build(_byte_level_library(), chat_template=named).chat_template_text == "D"
    assert _build(_byte_level_library(), chat_template="X").chat_template_text == "X"
    assert _build(_byte_level_library()).chat_template_text is None


def test_faults_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        text_tokenizer.build_tokenizer(TokenizerSource("hf", {}), 10)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: "):
        text_tokenizer.build_tokenizer(TokenizerSource("hf", {}, "{"), 10)
    with pytest.raises(ConfigError, match="bos_token '<x>' is not in"):
        _build(_byte_level_library(), bos_token="<x>")
    library = _byte_level_library()
    library.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="decoder 'WordPiece' is not supported"):
        _build(library)
