"""Special tokens: which of them end a generation, and how a text is split at them.

Files name one end token (`eos_token_id`), models use several, so llama.cpp also recognizes them by their text; this
module holds the same texts (`llama_vocab::impl::load`). Left out: the exceptions that it makes for gpt-oss, Gemma 4
and PLaMo, architectures that are not served.
"""

from collections.abc import Mapping, Sequence

from server.text.vocabulary import SPECIAL_KINDS, TokenKind

# fmt: off
_END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>", "<turn|>",
    "<end_of_utterance>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})
# fmt: on
# Fill-in-the-middle tokens by the stem of the key (`fim_pad_token_id`) that names them where the file does.
_FIM_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_END_STEMS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def find(named: Mapping[str, int], ids_by_text: Mapping[str, int], kinds: bytes) -> tuple[frozenset[int], bytes]:
    """All tokens that end a generation, and `kinds` with the tokens known by their text marked as control tokens.

    `named` has the ids that the file names, by the stem of their key ("eos", "fim_pad"); such a key comes before
    the known texts of fill-in-the-middle tokens.
    """
    by_text = {"": _END_TEXTS} | {stem: texts.split() for stem, texts in _FIM_TEXTS.items() if stem not in named}
    ends = {named[stem] for stem in _END_STEMS if stem in named}
    fixed = bytearray(kinds)
    for stem, texts in by_text.items():
        found = [ids_by_text[text] for text in texts if text in ids_by_text]
        for token_id in found:
            fixed[token_id] = TokenKind.CONTROL
        if not stem or stem in _END_STEMS:
            ends.update(found)
    return frozenset(ends), bytes(fixed)


NAMED_STEMS = (*_FIM_TEXTS, "eos", "eot", "eom")


class SpecialTokenSplitter:
    """Splits text at special tokens, exactly as llama.cpp does: longer tokens first over the whole text, each at
    its leftmost places; user-defined tokens always, control and unknown ones only when `parse_special`."""

    def __init__(self, tokens: Sequence[str], kinds: bytes) -> None:
        marked = (*SPECIAL_KINDS, TokenKind.USER_DEFINED)
        ids = [token_id for token_id, kind in enumerate(kinds) if kind in marked]
        ids.sort(key=lambda token_id: -len(tokens[token_id].encode("utf-8", "replace")))
        self._all = [(tokens[token_id], token_id) for token_id in ids]
        self._user_defined = [(tokens[i], i) for i in ids if kinds[i] == TokenKind.USER_DEFINED]

    def split(self, text: str, *, parse_special: bool) -> list[str | int]:
        """Pieces in order: text to tokenize (never empty) or a token id."""
        pieces: list[str | int] = [text] if text else []
        for token, token_id in self._all if parse_special else self._user_defined:
            if token not in text:
                continue
            finer: list[str | int] = []
            for piece in pieces:
                if isinstance(piece, int):
                    finer.append(piece)
                    continue
                for index, part in enumerate(piece.split(token)):
                    if index:
                        finer.append(token_id)
                    if part:
                        finer.append(part)
            pieces = finer
        return pieces
