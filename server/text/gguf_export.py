"""A Hugging Face tokenizer as the metadata of a GGUF file: the opposite of gguf_source.py.

`tokenizer.ggml.pre` is found by comparing how the tokenizer cuts texts into words with how each known name does.
Scores of a SentencePiece vocabulary follow the ranks of its merges. In the end the metadata is read as any file's is,
and must give the same tokens for the same texts; whatever cannot be said in a GGUF file is refused, by name.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from quant.model_types import TokenizerSource
from server.errors import ConfigError
from server.text import gguf_source, hf_source, pretokenizers
from server.text.vocabulary import TokenKind, Vocabulary, byte_level_bytes

# What the rules differ in: digits by one, three or many, contractions of either case, runs of spaces and line ends,
# camel case, scripts without case, marks, symbols.
PROBES = (
    "Hello, world!  It's 3:45 pm on 2024-11-21; 1234567 x 89 = ?",
    "I'LL they'Ve we're don'T it'S you'D (I'm) 'tis",
    "def camelCaseName(self, HTTPServer):\n\n    return x+1\r\n\t\t# done\n \n  \n",
    "a b  c   d    e        f                g                                 h  ",
    "naïve façade Größe x\u0301 q\u0323y ÀÉÎ ŁódźĂ Ελληνικά Кириллица ЁЛКА",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "日本語のテキスト、中文文本。한국어 문장 ｶﾀｶﾅ １２３",
    "$100 €20 50% #tag @user a_b c-d e/f\\g <tag> {x:[1,2]} \"q\" `code` ~^|=+* …—–",
    "🙂🙃 👩‍👩‍👧 ①②③ ½ ²³ Ⅷ \u00a0nbsp\u200bzero ¿qué? ¡sí!",
    "/a/b/c.txt http://x.y/z?q=1&r=2 \n\n\n x\n\ty",
)  # fmt: skip
_ID_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_END_KEYS = ("eot", "eom")  # further ends of a generation that a file can name


def gguf_tokenizer_metadata(source: TokenizerSource, vocab_size: int) -> dict[str, Any]:
    """Every `tokenizer.*` key. The vocabulary is padded to the embedding's rows. Raises ConfigError."""
    encoder, vocabulary = hf_source.from_directory(source.tokenizer_json, source.metadata)
    assert source.tokenizer_json is not None
    document = json.loads(source.tokenizer_json)
    model = document["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer.json: a model of type {model.get('type')!r} has no form in a GGUF file (BPE has)")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    values: dict[str, Any]
    if vocabulary.normal_bytes is byte_level_bytes:
        values = {"model": "gpt2", "pre": _pre(source.tokenizer_json, document), "merges": merges}
    else:
        values = {
            "model": "llama",
            "scores": _scores(vocabulary, merges),
            "add_space_prefix": vocabulary.has_prefix_space,
        }
    holes = vocab_size - len(vocabulary.tokens)
    tokens = [token or f"[UNUSED_{i}]" for i, token in enumerate([*vocabulary.tokens, *[""] * holes])]
    values |= {"tokens": tokens, "token_type": [*vocabulary.kinds, *[int(TokenKind.UNUSED)] * holes]}
    if "scores" in values:
        values["scores"] = [*values["scores"], *[0.0] * holes]
    values |= _special(vocabulary)
    metadata = {f"ggml.{key}": value for key, value in values.items()}
    if (template := source.metadata.get("chat_template")) is not None:
        metadata["chat_template"] = _template_text(template)
    _name_ends(metadata, vocabulary)
    _check(metadata, vocabulary, encoder)
    return {f"tokenizer.{key}": value for key, value in metadata.items()}


def _template_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    by_name = {entry["name"]: entry["template"] for entry in value}
    if "default" not in by_name:
        raise ConfigError(f"tokenizer_config.json: chat templates {', '.join(by_name)}, none of them named default")
    return str(by_name["default"])


def _pre(tokenizer_json: str, document: Mapping[str, Any]) -> str:
    normalizer = document.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # which llama.cpp leaves out, for any model
        raise ConfigError(f"tokenizer.json: a normalizer of type {normalizer.get('type')!r} has no form in a GGUF file")
    library = Tokenizer.from_str(tokenizer_json)
    ignores_merges = bool(document["model"].get("ignore_merges"))
    wanted = [_words(library.pre_tokenizer, text) for text in PROBES]
    for name in pretokenizers.known_names_in_order():
        rule = pretokenizers.pre_tokenizer(name)
        if rule.ignore_merges is not ignores_merges:
            continue
        cutter = pretokenizers.build(rule)
        if all(_words(cutter, text) == words for text, words in zip(PROBES, wanted, strict=True)):
            return name
    raise ConfigError("tokenizer.json: it cuts text into words in a way that no known `tokenizer.ggml.pre` does")


def _words(cutter: Any, text: str) -> list[str]:
    return [word for word, _ in cutter.pre_tokenize_str(text)]


def _scores(vocabulary: Vocabulary, merges: list[str]) -> list[float]:
    """Earlier merges score higher; what no merge makes is never joined."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [
        -float(ranks.get(token, len(merges))) if kind == TokenKind.NORMAL else 0.0
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]


def _special(vocabulary: Vocabulary) -> dict[str, Any]:
    ids_by_text = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    found = {
        f"{key}_token_id": ids_by_text.get(vocabulary.special_tokens.get(f"{name}_token", ""))
        for name, key in _ID_KEYS.items()
    }
    found |= {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
    return {key: token_id for key, token_id in found.items() if token_id is not None} | {
        "add_bos_token": bool(vocabulary.prefix_ids),
        "add_eos_token": bool(vocabulary.suffix_ids),
    }


def _name_ends(metadata: dict[str, Any], vocabulary: Vocabulary) -> None:
    """End tokens of generation_config.json that their text does not tell."""
    known = gguf_source.from_metadata(metadata)[1].eog_ids
    unnamed = sorted(vocabulary.eog_ids - known)
    if len(unnamed) > len(_END_KEYS):
        texts = ", ".join(repr(vocabulary.tokens[token_id]) for token_id in unnamed)
        raise ConfigError(f"generation_config.json: a GGUF file cannot name so many ends of a generation: {texts}")
    metadata |= {f"ggml.{key}_token_id": token_id for key, token_id in zip(_END_KEYS, unnamed, strict=False)}


def _check(metadata: Mapping[str, Any], vocabulary: Vocabulary, encoder: hf_source.HfEncoder) -> None:
    written, again = gguf_source.from_metadata(metadata)
    for text in PROBES:
        if written.encode(text, parse_special=True) != encoder.encode(text, parse_special=True):
            raise ConfigError(f"tokenizer.json: as a GGUF file's it would tokenize {text!r} differently")
    facts = ("prefix_ids", "suffix_ids", "eog_ids", "bos_id", "eos_id", "has_prefix_space")
    for fact in facts:
        if getattr(again, fact) != getattr(vocabulary, fact):
            was, is_now = getattr(vocabulary, fact), getattr(again, fact)
            raise ConfigError(f"tokenizer.json: in a GGUF file its {fact} would be {is_now}, not {was}")
