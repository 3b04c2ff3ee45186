"""SentencePiece-style BPE from scores: of all neighbours whose joint text is a token, join those with the best score.

Twice: as ranked merges for the `tokenizers` library (fast), and as the algorithm itself, llama.cpp's
`llm_tokenizer_spm`, in plain Python (about 2.5 µs a character). Where tokens share a score llama.cpp takes the
leftmost pair, which a list of merges can say only for runs of one character (Llama's runs of spaces are such a
group). Trained SentencePiece BPE models have no other ties; vocabularies that do (unigram models, some conversions)
are tokenized by the second.
"""

import heapq
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from server.text.vocabulary import TokenKind

_JOINABLE = (TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED)
"""Not control tokens: text that merely spells one never becomes it."""


def ranked_merges(
    tokens: Sequence[str], kinds: bytes, scores: np.ndarray, ids_by_text: Mapping[str, int]
) -> tuple[list[tuple[str, str]], bool]:
    """Every way to join two tokens into a third, by the score of the result; and whether that is exact.

    Among equal scores, and among several ways to make one token, the longer left part comes first: joining from the
    left, the leftmost pair of a run is the one whose left part has grown.
    """
    order = [i for i in np.argsort(-scores, kind="stable").tolist() if kinds[i] in _JOINABLE and len(tokens[i]) > 1]
    run_scores: dict[str, set[float]] = {}
    for token_id in order:
        text = tokens[token_id]
        if text == text[0] * len(text):
            run_scores.setdefault(text[0], set()).add(float(scores[token_id]))
    merges: list[tuple[str, str]] = []
    is_exact = all(char in ids_by_text for char in set("".join([tokens[token_id] for token_id in order])))
    for _, group in groupby(order, key=lambda token_id: scores[token_id]):
        ways = [(text, _cuts(text, ids_by_text)) for text in (tokens[token_id] for token_id in group)]
        made = [text for text, cuts in ways if cuts]
        if len(made) > 1:
            characters = set("".join(made))
            is_exact = is_exact and len(characters) == 1 and len(run_scores[characters.pop()]) == 1
        pairs = [(text[:cut], text[cut:]) for text, cuts in ways for cut in cuts]
        merges += sorted(pairs, key=lambda pair: -len(pair[0]))
    return merges, is_exact


def _cuts(text: str, ids_by_text: Mapping[str, int]) -> list[int]:
    return [cut for cut in range(1, len(text)) if text[:cut] in ids_by_text and text[cut:] in ids_by_text]


class ScoreMerger:
    """Tokenizes one piece of text (spaces already written as U+2581) the plain way."""

    def __init__(self, tokens: Sequence[str], kinds: bytes, scores: np.ndarray, ids_by_text: Mapping[str, int]) -> None:
        self._ids_by_text = ids_by_text
        self._costs = {tokens[i]: -float(scores[i]) for i, kind in enumerate(kinds) if kind in _JOINABLE}

    def tokenize(self, text: str) -> list[int]:
        parts = list(text)  # '' once a part was joined to its left neighbour
        left_of = list(range(-1, len(parts) - 1))
        right_of = [*range(1, len(parts)), -1]
        heap: list[tuple[float, int, int, int]] = []  # cost, place of the left part, of the right part, length

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = parts[left] + parts[right]
                if joined in self._costs:
                    heapq.heappush(heap, (self._costs[joined], left, right, len(joined)))

        for place in range(len(parts) - 1):
            offer(place, place + 1)
        while heap:
            _, left, right, length = heapq.heappop(heap)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two has been joined elsewhere since
            parts[left] += parts[right]
            parts[right] = ""
            right_of[left] = right_of[right]
            if right_of[right] >= 0:
                left_of[right_of[right]] = left
            offer(left_of[left], left)
            offer(left, right_of[left])
        return [token_id for part in parts if part for token_id in self._ids(part)]

    def _ids(self, part: str) -> list[int]:
        if part in self._ids_by_text:
            return [self._ids_by_text[part]]
        return [self._ids_by_text[f"<0x{byte:02X}>"] for byte in part.encode()]
