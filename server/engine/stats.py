"""Counters of the engine thread and the snapshot that /metrics reads.

One thread writes, any thread reads: plain ints under the GIL, no lock, so that a scrape never blocks a step. A
snapshot may be torn by one step between two of its fields, which a counter does not mind.
"""

import math
from collections import deque
from dataclasses import dataclass, field

BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of the histogram of sequences in a step; one more bucket counts the larger ones."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_blocks_used: int
    """Blocks that a sequence refers to; unreferenced cached blocks count as free."""
    num_blocks_cached: int
    num_blocks_total: int
    num_adapters: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    """Of admitted requests, cached ones included."""
    generated_tokens: int
    num_drafts: int
    """Steps of a sequence that carried guesses."""
    draft_tokens: int
    """Guesses computed."""
    accepted_tokens: int
    """Of them equal to what was sampled."""
    forced_tokens: int
    """Tokens that a grammar left no choice about, computed along with others."""
    num_preemptions: int
    num_steps: int
    num_step_errors: int
    step_seconds: float
    num_finished: int
    batch_size_counts: tuple[int, ...]
    """Steps per bucket of BATCH_SIZE_BUCKETS (not cumulative), the last for anything larger."""


@dataclass(slots=True)
class Counters:
    """What only grows."""

    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_step_errors: int = 0
    step_seconds: float = 0.0
    num_finished: int = 0
    batch_size_counts: list[int] = field(default_factory=lambda: [0] * (len(BATCH_SIZE_BUCKETS) + 1))

    def snapshot(
        self,
        *,
        num_running: int,
        num_waiting: int,
        num_blocks_used: int,
        num_blocks_cached: int,
        num_blocks_total: int,
        num_adapters: int,
    ) -> EngineStats:
        return EngineStats(
            num_running=num_running,
            num_waiting=num_waiting,
            num_blocks_used=num_blocks_used,
            num_blocks_cached=num_blocks_cached,
            num_blocks_total=num_blocks_total,
            num_adapters=num_adapters,
            prefix_query_tokens=self.prefix_query_tokens,
            prefix_hit_tokens=self.prefix_hit_tokens,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            num_drafts=self.num_drafts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            forced_tokens=self.forced_tokens,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
            num_step_errors=self.num_step_errors,
            step_seconds=self.step_seconds,
            num_finished=self.num_finished,
            batch_size_counts=tuple(self.batch_size_counts),
        )

    def count_step(self, num_seqs: int, seconds: float) -> None:
        self.num_steps += 1
        self.step_seconds += seconds
        # Bucket i holds sizes in (2^(i-1), 2^i]: the bounds are the powers of two.
        self.batch_size_counts[min((num_seqs - 1).bit_length(), len(BATCH_SIZE_BUCKETS))] += 1


class FinishRate:
    """How fast sequences end, for Retry-After: the last endings (about one full batch of them) and the time since."""

    def __init__(self, num_kept: int = 32) -> None:
        self._times: deque[float] = deque(maxlen=num_kept)

    def add(self, now: float) -> None:
        self._times.append(now)

    def seconds_for(self, num_sequences: int, now: float, *, most: int = 60) -> int:
        """Whole seconds, 1 to `most`, in which `num_sequences` should end; 1 while nothing is known."""
        if not self._times:
            return 1
        seconds_each = (now - self._times[0]) / len(self._times)
        return max(1, min(most, math.ceil(num_sequences * seconds_each)))
