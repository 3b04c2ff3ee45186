"""Examples that teach copying: runs of random tokens, and the same runs again in another order.

A call copies its arguments from the prompt, word by word. In dialogues only a tenth of the tokens are answers and few
of those are copied words, always from the same lists, so that a small model learns the words and not to copy them: a
run without these examples had no random token right after 16 M tokens. Here every second token is one that only copying
predicts, over the whole vocabulary (induction, Olsson et al. 2022, arXiv:2209.11895).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.packed import Example
from server.text.vocabulary import TokenKind

MOST_RUNS = 4
LENGTHS = (2, 24)
"""Tokens of a run, by their logarithm: short ones are learned first, and long ones from them."""


def plain_tokens(metadata: Mapping[str, Any], examples: Sequence[Example]) -> NDArray[np.int32]:
    """Ids of what the examples' texts are made of: no control tokens."""
    kinds = np.asarray(metadata["tokenizer.ggml.token_type"])
    used = np.unique(np.concatenate([one.token_ids for one in examples]))
    return used[kinds[used] == TokenKind.NORMAL].astype(np.int32)


def copying_examples(tokens: NDArray[np.int32], number: int, *, seed: int) -> list[Example]:
    """`number` examples over `tokens`. The first token of a repeated run carries no loss: which one comes is chance."""
    rng = np.random.default_rng(seed)
    return [_example(tokens, f"copying-{index}:0", rng) for index in range(number)]


def _example(tokens: NDArray[np.int32], name: str, rng: np.random.Generator) -> Example:
    shortest, longest = np.log(LENGTHS)
    lengths = np.exp(rng.uniform(shortest, longest, size=int(rng.integers(1, MOST_RUNS + 1))))
    runs = [rng.choice(tokens, round(length)) for length in lengths]
    again = [runs[place] for place in rng.permutation(len(runs))]
    weights = [np.zeros(sum(map(len, runs)))]
    weights += [np.r_[0, np.ones(len(run) - 1)] for run in again]
    ids = np.concatenate(runs + again).astype(np.int32)
    return Example(name, ids, np.concatenate(weights).astype(np.float32), cluster="copying")
