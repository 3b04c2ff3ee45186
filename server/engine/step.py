"""One step between its three verbs: what the scheduler plans, and what the sampler makes of it.

Not covered: how a plan is made (scheduler.py) and how it becomes arrays (batch.py).
"""

from dataclasses import dataclass, field

import numpy as np

from server.engine.core_api import FloatArray, IntArray
from server.engine.params import TokenLogprob
from server.engine.sequence import Sequence


@dataclass(slots=True)
class StepPlan:
    """One step: `sequences[i]` computes its next `num_tokens[i]` tokens and then those of its draft.

    The first `num_decodes` have one token each and no draft.
    """

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_score_rows: list[int] = field(default_factory=list)
    num_decodes: int = 0
    num_decode_rows: int = 0
    """Tokens of all that are past their prompt, drafts included."""
    has_prompts: bool = False
    admitted: list[Sequence] = field(default_factory=list)
    """Their slots need `set_sequence` before the step."""

    def add(self, seq: Sequence, num_tokens: int, num_score_rows: int) -> None:
        self.sequences.append(seq)
        self.num_tokens.append(num_tokens)
        self.num_score_rows.append(num_score_rows)


@dataclass(slots=True)
class StepResult:
    """The sampler's output rows, in the order of the plan's logit rows. Views: good until the next step."""

    tokens: IntArray
    logprobs: FloatArray
    top_ids: IntArray
    top_logprobs: FloatArray


def token_logprobs(result: StepResult, start: int, stop: int, num_top: int) -> list[TokenLogprob]:
    """Of rows `start` to `stop`, each with its `num_top` likeliest alternatives."""
    ids = result.tokens[start:stop].tolist()
    values = result.logprobs[start:stop].tolist()
    top_ids: list[list[int]] = np.asarray(result.top_ids[start:stop, :num_top]).tolist()
    top_values: list[list[float]] = np.asarray(result.top_logprobs[start:stop, :num_top]).tolist()
    return [
        TokenLogprob(token_id, logprob, tuple(zip(tops, top_logprobs, strict=True)))
        for token_id, logprob, tops, top_logprobs in zip(ids, values, top_ids, top_values, strict=True)
    ]
