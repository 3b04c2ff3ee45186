r"""How a byte-level BPE vocabulary cuts text into words before merging: one entry per `tokenizer.ggml.pre`.

The reference is llama.cpp (`src/llama-vocab.cpp`, `src/unicode.cpp`), whose results the tests compare with. A word
pattern is applied to the pieces that the one before it left, matches and gaps alike become pieces, and no pattern
looks beyond its piece: what `Split(..., "isolated")` of the `tokenizers` library does.

Not equal, on purpose: characters that Unicode assigned after version 15.0 are unassigned to llama.cpp and letters,
digits or symbols to the library (about 5,200 code points, most of them Egyptian hieroglyphs and the last CJK block).
Names whose rules no regular expression states (kimi-k2, afmoe, tiny_aya) and those of vocabularies without byte
encoding (gemma4, whitespace) are absent and so refused by name.
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from server.errors import ConfigError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Not (?i:...): the library would also fold the long s (U+017F) into 's', llama.cpp does not.
_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_PUNCTUATION_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"(?:{_CONTRACTIONS})|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION_LINES}|{_LINES_AND_SPACES}"
_QWEN2 = rf"(?:{_CONTRACTIONS})|{_WORD}|\p{{N}}|{_PUNCTUATION_LINES}|{_LINES_AND_SPACES}"
_QWEN35 = (
    rf"(?:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
)
_MINICPM5 = rf"(?:{_CONTRACTIONS})|{_WORD}|\p{{N}}+|{_PUNCTUATION_LINES}|{_LINES_AND_SPACES}"
_SEED_CODER = rf"(?:{_CONTRACTIONS})|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES_AND_SPACES}"
_JAIS2 = (
    rf"(?:{_CONTRACTIONS})|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION_LINES}|\s*[\r\n]+|"
    + "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
    + r"|\s{1}"
)
# llama.cpp knows no letter case beyond ASCII here: every other letter counts as upper and lower case at once.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_CASED_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES_AND_SPACES}"
_TEKKEN = _CASED_WORD.replace("{0}", "") + rf"|\p{{N}}|{_CASED_REST}"
_GPT4O = _CASED_WORD.replace("{0}", f"(?:{_CONTRACTIONS})?") + rf"|\p{{N}}{{1,3}}|{_CASED_REST}"

_IDEOGRAPHS_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# llama.cpp never takes white space for the ideographs and punctuation of the DeepSeek ranges that span it.
_IDEOGRAPHS_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&\\S]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES_AND_SPACES}"
)
# Letters of the scripts with case, without modifier and other letters, as of the Unicode version that was used.
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ"
    "\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ"
    "ﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_PUNCTUATED = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Patterns in order, and what llama.cpp ties to the name when the file says nothing."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""
    add_bos: bool = False
    has_default_bos: bool = True


_FALCON_GPT2 = _GPT2.removesuffix(r"|\s+")
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _FALCON_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", _IDEOGRAPHS_AND_KANA, _DEEPSEEK3))

_BY_RULE: dict[PreTokenizer, str] = {
    _DEFAULT: "default",
    _LLAMA_BPE: "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe",
    PreTokenizer((_LLAMA3,), has_default_bos=False): "chatglm-bpe",
    PreTokenizer((_LLAMA3,), ignore_merges=True, has_default_bos=False): "glm4 glm5",
    PreTokenizer((_GPT2,)): "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling",
    _DIGITS_GPT2: "starcoder refact command-r smollm codeshell exaone minerva-7b",
    PreTokenizer(
        (_QWEN2,)
    ): "qwen2 deepseek-r1-qwen kormo stablelm2 megrez hunyuan grok-2 bailingmoe bailingmoe2 llada-moe",
    PreTokenizer((_QWEN35,)): "qwen35",
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 minimax-m2",
    PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True): "minicpm5",
    PreTokenizer((_SEED_CODER,)): "seed-coder",
    PreTokenizer((_JAIS2,)): "jais-2",
    PreTokenizer((_PUNCTUATED,)): "poro-chat bloom gpt3-finnish",
    PreTokenizer((_PUNCTUATED, r"\p{N}")): "viking",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _FALCON_GPT2, "[0-9][0-9][0-9]")): "falcon",
    _DEEPSEEK_V3: "deepseek-v3 hunyuan-dense joyai-llm",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS_AND_HANGUL, r"\p{N}")): "deepseek-coder",
    PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002&&\\S]+",
            r"\s+$",
            _IDEOGRAPHS_AND_HANGUL,
            r"\p{N}+",
        )
    ): "deepseek-llm",
}
_BY_NAME = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}


def known_names() -> frozenset[str]:
    """Every `tokenizer.ggml.pre` that is served."""
    return frozenset(_BY_NAME)


def known_names_in_order() -> tuple[str, ...]:
    """The same, the common name of a rule before its others."""
    return tuple(_BY_NAME)


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """The rules of a `tokenizer.ggml.pre`; None (an old file without the key) is "default", as in llama.cpp."""
    rule = _BY_NAME.get("default" if name is None else name)
    if rule is None:
        raise ConfigError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(sorted(_BY_NAME))}")
    return rule


def build(rule: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The library's object for `rule`, byte encoding included."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
