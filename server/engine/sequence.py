"""One request inside the engine: its tokens, its blocks, where it is in its life.

A sequence is data. Only scheduler.py changes `state`; only block_manager.py changes `blocks`, `block_keys` and
`num_published`; only drafting.py makes drafts. Tokens lie in one int array, prompt first, so that a preempted
sequence's output is simply the longer prompt of its next life.
"""

from array import array
from dataclasses import dataclass
from enum import Enum

from server.engine.adapters import LoadedAdapter
from server.engine.core_api import NO_ADAPTER, NO_LOGPROBS
from server.engine.params import FinishReason, Grammar, SamplingParams, TokenLogprob


class SequenceState(Enum):
    """WAITING -> RUNNING -> FINISHED; a preempted sequence goes from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Guess:
    """A token of a draft that is sampled all the same, because it may be wrong or its log-probability is wanted."""

    index: int
    """In the draft."""
    length: int
    """Tokens before it that matched where it was copied from; 0 when it is forced."""
    token: int = -1
    """Set when the guess was not computed."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that the next step computes after a sequence's own, as if they had been sampled."""

    tokens: list[int]
    rows: list[int]
    """Row r comes after the first r draft tokens and samples the one at r. Only these rows get logits: one before
    every guess, and the last."""
    guesses: list[Guess]
    unpaid: Guess | None = None
    """What was not worth a row; still compared with what is sampled there."""

    def held(self, sampled: list[int]) -> list[int]:
        """The tokens that come of it, given one a row: those that are as drafted, and the first that is not."""
        tokens: list[int] = []
        for row, token in zip(self.rows, sampled, strict=True):
            if token < 0:  # not sampled: the row before it was told to end the draft
                break
            tokens += self.tokens[len(tokens) : row]
            tokens.append(token)
            if row == len(self.tokens) or token != self.tokens[row]:
                break
        return tokens


NO_DRAFT = Draft([], [0], [])


class Sequence:
    """`seq_id` is the order of arrival: smaller runs first and is preempted last."""

    __slots__ = (
        "adapter",
        "block_keys",
        "blocks",
        "cache_salt",
        "draft",
        "draft_pause",
        "end_token_ids",
        "error",
        "finish_reason",
        "grammar",
        "lora_slot",
        "max_length",
        "num_cached_tokens",
        "num_computed",
        "num_held",
        "num_prefix_waits",
        "num_prompt",
        "num_published",
        "num_tested",
        "num_top",
        "params",
        "prompt_logprobs",
        "samples_forced",
        "seed",
        "seq_id",
        "slot",
        "state",
        "token_ids",
        "use_mask",
        "was_admitted",
    )

    def __init__(
        self,
        seq_id: int,
        token_ids: "array[int]",
        params: SamplingParams,
        *,
        seed: int,
        end_token_ids: frozenset[int],
        max_length: int,
        adapter: LoadedAdapter | None = None,
        grammar: Grammar | None = None,
        cache_salt: bytes = b"",
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = token_ids
        self.num_prompt = len(token_ids)
        self.params = params
        self.seed = seed
        self.end_token_ids = end_token_ids
        self.max_length = max_length  # tokens in all at which it ends: prompt + max_tokens or the model's limit
        self.adapter = adapter
        self.grammar = grammar
        self.cache_salt = cache_salt
        # The values that every step's arrays need, looked up once.
        self.lora_slot = adapter.slot if adapter is not None else NO_ADAPTER
        self.num_top = params.num_logprobs if params.num_logprobs is not None else NO_LOGPROBS
        self.use_mask = 1 if grammar is not None else 0
        # The sampler counts for the penalties what it samples, and log-probabilities need a row's logits.
        self.samples_forced = params.has_penalties or params.num_logprobs is not None

        self.state = SequenceState.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.slot = -1
        self.was_admitted = False
        self.num_computed = 0  # tokens whose KV lies in the blocks
        self.num_cached_tokens = 0  # of them from the prefix cache, at the first admission
        self.num_prefix_waits = 0  # steps spent waiting for somebody else to compute the same block
        self.blocks: list[int] = []
        self.block_keys: list[bytes] = []  # of full blocks, as far as anybody asked
        self.draft = NO_DRAFT  # of the step that is planned
        self.draft_pause = 0  # steps in which no guess is looked for
        self.num_tested = 0.0  # guesses compared, recent ones weighing more
        self.num_held = 0.0  # of them right
        self.num_published = 0  # leading blocks that are in the prefix cache, or were offered to it
        # Entry 0 has no predecessor. None when nobody asked, or once delivered.
        self.prompt_logprobs: list[TokenLogprob | None] | None = [None] if self.wants_prompt_logprobs else None

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.num_prompt_logprobs is not None

    @property
    def uses_prefix_cache(self) -> bool:
        """A cached block has no logits, so a sequence that wants its prompt's computes all of it."""
        return self.params.num_prompt_logprobs is None

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def num_score_rows(self, num_tokens: int) -> int:
        """How many of the next `num_tokens` rows give a prompt token's log-probability that is still missing."""
        if self.prompt_logprobs is None:
            return 0
        # The row of position p scores token p + 1.
        first = max(self.num_computed + 1, len(self.prompt_logprobs))
        return max(0, min(self.num_computed + num_tokens, self.num_prompt - 1) - first + 1)
