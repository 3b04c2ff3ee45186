"""One request inside the engine: its tokens, its blocks, where it is in its life.

A sequence is data. Only scheduler.py changes `state`; only block_manager.py changes `blocks`, `block_keys` and
`num_published`. Tokens lie in one int array, prompt first, so that a preempted sequence's output is simply the
longer prompt of its next life.
"""

from array import array
from enum import Enum

from server.engine.adapters import LoadedAdapter
from server.engine.core_api import NO_ADAPTER, NO_LOGPROBS
from server.engine.params import FinishReason, Grammar, SamplingParams, TokenLogprob


class SequenceState(Enum):
    """WAITING -> RUNNING -> FINISHED; a preempted sequence goes from RUNNING back to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """`seq_id` is the order of arrival: smaller runs first and is preempted last."""

    __slots__ = (
        "adapter",
        "block_keys",
        "blocks",
        "cache_salt",
        "end_token_ids",
        "error",
        "finish_reason",
        "grammar",
        "lora_slot",
        "max_length",
        "num_cached_tokens",
        "num_computed",
        "num_prefix_waits",
        "num_prompt",
        "num_published",
        "num_top",
        "params",
        "prompt_logprobs",
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
