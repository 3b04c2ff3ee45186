"""What goes into the engine with a request and what comes out of it. Token ids only, no text.

Not covered: stop strings and tool calls; those are text and live above the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens. Values are validated above the engine; `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output; 1 is off."""
    presence_penalty: float = 0.0
    """Over output only, as is `frequency_penalty`."""
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """Unsigned 64-bit; None draws one at submission."""
    choice: int = 0
    """Index among the `n` answers of one request; part of the random key, so that they differ."""
    min_tokens: int = 0
    """End-of-generation and stop tokens are masked until this many tokens have come out."""
    stop_token_ids: frozenset[int] = frozenset()
    """Extra ends beside the model's end-of-generation tokens."""
    ignore_eos: bool = False
    num_logprobs: int | None = None
    """None: no log-probabilities; n: the chosen token's and the n most likely ones'."""
    num_prompt_logprobs: int | None = None
    """As `num_logprobs`, for the prompt's tokens (bypasses the prefix cache)."""
    speculation: bool = True
    """Tokens may be computed before they are sampled: the same answer, sooner."""

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of one token under the model's raw logits, and the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class EngineOutput:
    """What one step added to one sequence.

    `token_ids` may be empty (a step that only finished the sequence or its prompt). The end-of-generation
    token is included when it was sampled. `prompt_logprobs` comes once, with the first output: entry 0 is None.
    Not frozen: making 32 of them a step took 40 us more then.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The end-of-generation or stop token that ended the sequence (also the last of `token_ids`)."""
    error: str | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""


class Grammar(Protocol):
    """Restricts one sequence's tokens. One object per sequence; calls come from the engine's threads only."""

    def fill_mask(self, mask: np.ndarray) -> None:
        """Set the bits of the allowed tokens in `mask`: int32, shape (mask_words,), little-endian bits."""

    def advance(self, token_id: int) -> bool:
        """Take a sampled token; False when the grammar does not accept it (a bug upstream)."""

    def is_finished(self) -> bool:
        """True when nothing but the end may follow."""

    def fork(self) -> "Grammar":
        """One more in the same state, to walk ahead on; cheap."""

    def take(self, token_ids: Sequence[int]) -> int:
        """Take tokens up to the first that is not accepted, which changes nothing; returns how many."""

    def forced_tokens(self) -> list[int]:
        """What must come next: the masks on the way leave each of these tokens and no other. Changes nothing."""
