"""Special tokens, BOS and EOS, end-of-generation tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import ConfigError, InvalidRequestError
from server.text.tokenizer import Tokenizer
from tests.server.text import make_corpus, small_vocabularies
from tests.server.text.corpus_texts import TEXTS
from tests.server.text.vocabulary_files import tokenizer_from, tokenizer_of_file
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

_SMALL: dict[str, Any] = json.loads(make_corpus.SMALL_CORPUS.read_text())


def _byte_level(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    metadata = small_vocabularies.byte_level_metadata(pre, _SMALL["merges"])
    metadata.update({f"ggml.{key}": value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def _sentencepiece(**changes: Any) -> dict[str, Any]:
    metadata = small_vocabularies.sentencepiece_metadata(_SMALL["pieces"])
    metadata.update({f"ggml.{key}": value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


def _ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    ids = [tokenizer.token_to_id(text) for text in texts]
    assert None not in ids
    return ids  # type: ignore[return-value]


def test_control_tokens_are_parsed_only_where_asked_for() -> None:
    tokenizer = tokenizer_from(_byte_level())
    (end,) = _ids(tokenizer, "<|im_end|>")
    assert end in tokenizer.encode("a<|im_end|>", add_special=False, parse_special=True)
    plain = tokenizer.encode("a<|im_end|>", add_special=False, parse_special=False)
    assert end not in plain
    assert tokenizer.decode(plain) == "a<|im_end|>"


def test_user_defined_tokens_are_always_parsed() -> None:
    tokenizer = tokenizer_from(_byte_level())
    (think,) = _ids(tokenizer, "<think>")
    for parse_special in (True, False):
        assert think in tokenizer.encode("<think>", add_special=False, parse_special=parse_special)
    assert not tokenizer.is_special(think)


def test_text_that_spells_a_control_token_never_becomes_it_by_merging() -> None:
    pieces = ["</", "s>", "<", "/", "s", ">"]
    tokenizer = tokenizer_from(small_vocabularies.sentencepiece_metadata(pieces, add_space_prefix=False))
    assert tokenizer.encode("</s>", add_special=False, parse_special=False) == _ids(tokenizer, "</", "s>")
    assert tokenizer.encode("</s>", add_special=False, parse_special=True) == _ids(tokenizer, "</s>")


def test_longer_special_tokens_are_found_first_over_the_whole_text() -> None:
    """llama.cpp's rule, not leftmost-longest: the longer token wins even where a shorter one begins before it."""
    metadata = _byte_level()
    metadata["ggml.tokens"] += ["ab[", "[cde]"]
    metadata["ggml.token_type"] += [4, 4]
    tokenizer = tokenizer_from(metadata)
    ids = tokenizer.encode("ab[cde]", add_special=False, parse_special=True)
    assert [tokenizer.token_bytes(i) for i in ids][-1] == b"[cde]"


@pytest.mark.parametrize("text", ["hello", "<s>hello", "", "<s>"])
def test_bos_comes_once(text: str) -> None:
    tokenizer = tokenizer_from(_sentencepiece())
    assert tokenizer.add_bos
    for ids in (tokenizer.encode(text, add_special=True, parse_special=True), tokenizer.encode_chat(text)):
        assert ids[0] == tokenizer.bos_token_id == 1
        assert 1 not in ids[1:]
    assert (1 in tokenizer.encode(text, add_special=False, parse_special=True)) == text.startswith("<s>")


def test_eos_is_added_to_completions_only() -> None:
    tokenizer = tokenizer_from(_sentencepiece(add_eos_token=True))
    assert tokenizer.encode("a", add_special=True, parse_special=True)[-1] == tokenizer.eos_token_id == 2
    assert 2 not in tokenizer.encode_chat("a")


def test_bos_by_pre_tokenizer() -> None:
    """llama.cpp adds BOS for Llama 3's rule though the file does not say so."""
    assert tokenizer_from(_byte_level("llama-bpe", add_bos_token=None)).add_bos
    assert not tokenizer_from(_byte_level("smollm", add_bos_token=None)).add_bos


def test_end_of_generation_tokens() -> None:
    metadata = _byte_level(eot_token_id=300)
    metadata["ggml.tokens"] += ["<|eot_id|>", "<|fim_pad|>", "<|fim_prefix|>"]
    metadata["ggml.token_type"] += [1, 4, 4]
    tokenizer = tokenizer_from(metadata)
    ends = _ids(tokenizer, "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|fim_pad|>")
    assert tokenizer.eog_token_ids == {*ends, 300}
    assert all(tokenizer.is_special(i) for i in _ids(tokenizer, "<|eot_id|>", "<|fim_pad|>", "<|fim_prefix|>"))


def test_special_tokens_for_templates() -> None:
    tokenizer = tokenizer_from(_byte_level(padding_token_id=2, unknown_token_id=2**32 - 1))
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer_from(_byte_level(bos_token_id=None)).bos_token == ""


def test_padding_rows_have_no_text() -> None:
    tokenizer = tokenizer_from(_byte_level(), 4096)
    assert tokenizer.vocab_size == 4096
    assert tokenizer.token_bytes(4095) == b""
    assert tokenizer.is_special(4095)
    assert tokenizer.decode([4095], skip_special=False) == ""


@pytest.mark.parametrize("token_id", [-1, 4096])
def test_decoding_a_foreign_id_is_refused(token_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"token id {token_id} is not in 0..4095"):
        tokenizer_from(_byte_level(), 4096).decode([token_id])


def test_lone_surrogates_are_refused() -> None:
    for metadata in (_byte_level(), _sentencepiece()):
        with pytest.raises(InvalidRequestError, match=r"U\+D800 at character 1"):
            tokenizer_from(metadata).encode("a\ud800", add_special=True, parse_special=True)


def test_digest_tells_vocabularies_and_rules_apart() -> None:
    same, again = (tokenizer_from(_byte_level("smollm")).digest for _ in range(2))
    others = {
        tokenizer_from(_byte_level("qwen2")).digest,
        tokenizer_from(_byte_level("smollm", add_bos_token=True)).digest,
        tokenizer_from(_byte_level("smollm", eot_token_id=300)).digest,
        tokenizer_from(_sentencepiece()).digest,
    }
    assert same == again
    assert len(others - {same}) == 4


def test_library_json_tokenizes_alike() -> None:
    from tokenizers import Tokenizer as Library

    text = "Hello  wörld 123½<|im_end|>\n<think>日本"
    for metadata in (_byte_level(), _sentencepiece(add_space_prefix=False)):
        tokenizer = tokenizer_from(metadata)
        library = Library.from_str(tokenizer.tokenizers_json)
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, at_start=False)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (_byte_level("kimi-k2"), "tokenizer.ggml.pre 'kimi-k2' is not supported"),
        (_byte_level(model="bert"), "tokenizer.ggml.model 'bert' is not supported"),
        (_byte_level(model=None), "tokenizer.ggml.model None is not supported"),
        (_byte_level(tokens=None), "tokenizer.ggml.tokens is missing"),
        (_byte_level(merges=None), "tokenizer.ggml.merges is missing"),
        (_byte_level(merges=["q zzz"]), "'q zzz' does not join two tokens"),
        (_byte_level(merges=["ab"]), "'ab' does not join two tokens"),
        (_byte_level(tokens=["a", "b", "a"]), "'a' occurs twice"),
        (_byte_level(token_type=[1, 1]), "tokenizer.ggml.token_type has 2 entries"),
        (_byte_level(add_bos_token=True, bos_token_id=None), "BOS token is to be added but bos_token_id names none"),
        (_sentencepiece(scores=None), "tokenizer.ggml.scores is missing"),
        (_sentencepiece(scores=[1.0]), "tokenizer.ggml.scores has 1 entries"),
        (_sentencepiece(tokens=["a"], token_type=[1], scores=[0.0]), "without the byte token <0x00>"),
    ],
)
def test_faulty_metadata_is_refused_by_key(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason.replace("(", r"\(")):
        tokenizer_from(metadata, 100_000)


def test_more_tokens_than_the_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="but the model only 100"):
        tokenizer_from(_byte_level(), 100)


def test_a_missing_pre_tokenizer_is_the_default_as_in_llamacpp() -> None:
    text = "x 12345 (a)"
    ids = [
        tokenizer_from(_byte_level(pre=pre)).encode(text, add_special=False, parse_special=True)
        for pre in ("default", None)
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_from_a_model_file(style: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of_file(write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer=style))
    text = "The quick brown fox, 12 ½ 日本"
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in tokenizer.eog_token_ids
    assert tokenizer.chat_template_text


def test_gguf_and_hugging_face_files_agree(tmp_path: Path) -> None:
    gguf = tokenizer_of_file(write_tiny_gguf(tmp_path / "tiny.gguf"))
    directory = tokenizer_of_file(write_tiny_hf(tmp_path / "tiny"))
    for text in TEXTS:
        assert gguf.encode(text, add_special=True, parse_special=True) == directory.encode(
            text, add_special=True, parse_special=True
        )
    assert gguf.eog_token_ids == directory.eog_token_ids


@pytest.mark.parametrize("metadata", [_byte_level(), _sentencepiece()])
def test_fewest_tokens_is_never_more_than_there_are(metadata: dict[str, Any]) -> None:
    tokenizer = tokenizer_from(metadata)
    longest = max(metadata["ggml.tokens"], key=len)
    for text in [*TEXTS, longest * 50]:
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special=False, parse_special=True))
    assert tokenizer.fewest_tokens("x" * 10**6) > 1000
