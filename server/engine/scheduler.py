"""Which sequences run in the next step, and what the step made of them: schedule, (run), postprocess.

Continuous batching with chunked prefill: decodes first, then prompt chunks up to the token budget, in order of arrival.
A sequence gets blocks for all of its present tokens at admission, so only decodes can run out of blocks; then the
latest arrival is preempted, and starts over later with its output as part of its prompt. The earliest arrival can
therefore always go on, and nothing waits for ever.

The only file that changes `Sequence.state`. Not covered: arrays and the core (batch.py, engine.py).
"""

from bisect import insort
from dataclasses import dataclass, field

import numpy as np

from server.engine.block_manager import BlockManager
from server.engine.core_api import FloatArray, IntArray
from server.engine.params import EngineOutput, FinishReason, TokenLogprob
from server.engine.sequence import Sequence, SequenceState
from server.engine.stats import Counters

MAX_MIXED_PREFILL_TOKENS = 64
"""Prompt tokens in a step that also decodes. 64 rows take a few times as long as a decode step of a few rows (weights
are read once either way), which bounds the gap between two tokens of a running answer; without decodes the whole
budget is used."""


@dataclass(slots=True)
class StepPlan:
    """One step: `sequences[i]` computes its next `num_tokens[i]` tokens; the first `num_decodes` have one each."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_score_rows: list[int] = field(default_factory=list)
    num_decodes: int = 0
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


Outputs = list[tuple[Sequence, EngineOutput]]


class Scheduler:
    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_logit_rows: int,
        max_mixed_prefill_tokens: int,
        counters: Counters,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every decode must fit one step"
        assert max_logit_rows >= max_num_seqs, "every decode must get its logits"
        assert max_mixed_prefill_tokens > 0
        self._blocks = block_manager
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._max_logit_rows = max_logit_rows
        self._max_mixed_prefill_tokens = max_mixed_prefill_tokens
        self._counters = counters
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        # Both in order of arrival.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        assert seq.state is SequenceState.WAITING
        insort(self.waiting, seq, key=_arrival)

    # -- schedule ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Pick the next step's work. Never empty while there is work."""
        plan = StepPlan()
        self._schedule_decodes(plan)
        budget = self._max_tokens - plan.num_decodes
        if plan.num_decodes:
            budget = min(budget, self._max_mixed_prefill_tokens)
        rows = self._max_logit_rows - plan.num_decodes
        for seq in self.running:
            if budget == 0 or rows == 0:
                break
            if seq.num_uncomputed > 1:
                budget, rows = self._add_chunk(plan, seq, budget, rows)
        if self.waiting and budget and rows:
            self._admit(plan, budget, rows)
        assert plan.sequences or not self.has_work, "the scheduler is stuck"
        return plan

    def _schedule_decodes(self, plan: StepPlan) -> None:
        """Every running sequence with one token to go; `running` may shrink from its end while we walk it."""
        running, block_size = self.running, self._blocks.block_size
        index = 0
        while index < len(running):
            seq = running[index]
            index += 1
            if len(seq.token_ids) - seq.num_computed != 1:
                continue
            if seq.num_computed == len(seq.blocks) * block_size:
                while self._blocks.num_available == 0 and running[-1] is not seq:
                    self._preempt(running[-1])
                if self._blocks.num_available == 0:
                    self._preempt(seq)
                    break
                self._blocks.append_block(seq)
            plan.add(seq, 1, 0)
        plan.num_decodes = len(plan.sequences)

    def _add_chunk(self, plan: StepPlan, seq: Sequence, budget: int, rows: int) -> tuple[int, int]:
        """Add as much of `seq`'s uncomputed tokens as fits; return what is left of both budgets."""
        num_tokens = min(seq.num_uncomputed, budget)
        num_scores = seq.num_score_rows(num_tokens)
        if num_scores and num_scores + 1 > rows:
            num_tokens = min(num_tokens, rows)  # at most one logit row a token
            num_scores = seq.num_score_rows(num_tokens)
        plan.add(seq, num_tokens, num_scores)
        num_samples = 1 if num_tokens == seq.num_uncomputed else 0
        return budget - num_tokens, rows - num_scores - num_samples

    def _admit(self, plan: StepPlan, budget: int, rows: int) -> None:
        """Start waiting sequences in order of arrival while slots, blocks and both budgets last."""
        index = 0
        num_held_back = 0  # they keep a slot's worth of room, so that later arrivals do not overtake without bound
        while index < len(self.waiting) and budget and rows:
            if len(self.running) + num_held_back >= self._max_num_seqs:
                return
            seq = self.waiting[index]
            num_hits = self._blocks.num_hit_blocks(seq)
            if self._should_wait_for_prefix(seq, num_hits):
                seq.num_prefix_waits += 1
                num_held_back += 1
                index += 1
                continue
            # Beside others leave each of them a block to grow into: an admission that forces a preemption within
            # the next 16 steps is wasted work. Alone, any sequence fits: submit refused what cannot.
            if self._blocks.num_needed(seq, num_hits) + len(self.running) > self._blocks.num_available:
                return
            del self.waiting[index]
            self._start(seq, num_hits)
            plan.admitted.append(seq)
            budget, rows = self._add_chunk(plan, seq, budget, rows)

    def _should_wait_for_prefix(self, seq: Sequence, num_hits: int) -> bool:
        """True while a running sequence computes the very block that `seq` would compute next.

        So `n` answers to one prompt, or many agents with one system prompt, compute it once. Bounded: the owner
        finishes about a block a step or more, so after as many waits as the prompt has blocks something else is
        wrong, and `seq` goes ahead.
        """
        keys, size = seq.block_keys, self._blocks.block_size
        if num_hits >= (len(seq.token_ids) - 1) // size or len(keys) <= num_hits:
            return False  # nothing more to gain, or the cache is off
        if seq.num_prefix_waits >= len(keys):
            return False
        key = keys[num_hits]
        return any(
            owner.num_published <= num_hits < len(owner.block_keys)
            and owner.block_keys[num_hits] == key
            and owner.num_computed < len(owner.token_ids) - 1
            for owner in self.running
        )

    def _start(self, seq: Sequence, num_hits: int) -> None:
        seq.state = SequenceState.RUNNING
        insort(self.running, seq, key=_arrival)
        seq.slot = self._free_slots.pop()
        self._blocks.admit(seq, num_hits)
        if not seq.was_admitted:
            seq.was_admitted = True
            seq.num_cached_tokens = seq.num_computed
            self._counters.prompt_tokens += seq.num_prompt
            if seq.uses_prefix_cache:
                self._counters.prefix_query_tokens += seq.num_prompt
                self._counters.prefix_hit_tokens += seq.num_computed

    def _preempt(self, seq: Sequence) -> None:
        """Give all of its blocks back; it recomputes them later (often from the cache)."""
        self._leave(seq)
        seq.state = SequenceState.WAITING
        seq.num_prefix_waits = 0
        self._counters.num_preemptions += 1
        insort(self.waiting, seq, key=_arrival)

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._blocks.release(seq)
        self._free_slots.append(seq.slot)
        seq.slot = -1

    # -- postprocess ------------------------------------------------------------------------------------------------

    def postprocess(self, plan: StepPlan, result: StepResult, outputs: Outputs) -> None:
        """Take in a step's tokens: publish blocks, append, finish. What clients get is appended to `outputs`."""
        tokens = result.tokens.tolist()
        block_size = self._blocks.block_size
        row = 0
        for seq, num_tokens, num_scores in zip(plan.sequences, plan.num_tokens, plan.num_score_rows, strict=True):
            seq.num_computed += num_tokens
            if seq.num_computed >= (seq.num_published + 1) * block_size:
                self._blocks.publish(seq)
            if num_scores:
                assert seq.prompt_logprobs is not None
                num_top = seq.params.num_prompt_logprobs
                assert num_top is not None
                seq.prompt_logprobs += _token_logprobs(result, row, row + num_scores, num_top)
                row += num_scores
            if seq.num_computed < len(seq.token_ids):
                continue  # in the middle of its prompt
            logprobs = None if seq.params.num_logprobs is None else _token_logprobs(result, row, row + 1, seq.num_top)
            outputs.append((seq, self._take_token(seq, tokens[row], logprobs)))
            row += 1
        assert row == len(tokens)

    def _take_token(self, seq: Sequence, token: int, logprobs: list[TokenLogprob] | None) -> EngineOutput:
        if seq.error is not None:  # its grammar failed while the forward pass ran: the token is meaningless
            self._finish(seq, "error")
            return EngineOutput(finish_reason="error", error=seq.error, num_cached_tokens=seq.num_cached_tokens)
        seq.token_ids.append(token)
        self._counters.generated_tokens += 1
        reason: FinishReason | None = None
        if token in seq.end_token_ids:
            reason = "stop"
        elif seq.grammar is not None and not seq.grammar.advance(token):
            reason, seq.error = "error", f"the grammar does not accept token {token}"
        elif len(seq.token_ids) >= seq.max_length:
            reason = "length"
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        if reason is not None:
            self._finish(seq, reason)
        return EngineOutput(
            token_ids=(token,),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=token if reason == "stop" else None,
            error=seq.error,
            num_cached_tokens=seq.num_cached_tokens,
        )

    # -- endings ----------------------------------------------------------------------------------------------------

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state is SequenceState.RUNNING:
            self._leave(seq)
        else:
            self.waiting.remove(seq)
        seq.state = SequenceState.FINISHED
        seq.finish_reason = reason
        self._counters.num_finished += 1

    def end(self, seq: Sequence, reason: FinishReason, outputs: Outputs, error: str | None = None) -> None:
        """End a sequence from outside a step (cancelled, failed, shut down); one that has ended is left alone."""
        if seq.state is SequenceState.FINISHED:
            return
        self._finish(seq, reason)
        seq.error = error
        outputs.append((seq, EngineOutput(finish_reason=reason, error=error, num_cached_tokens=seq.num_cached_tokens)))


def _arrival(seq: Sequence) -> int:
    return seq.seq_id


def _token_logprobs(result: StepResult, start: int, stop: int, num_top: int) -> list[TokenLogprob]:
    ids = result.tokens[start:stop].tolist()
    values = result.logprobs[start:stop].tolist()
    top_ids: list[list[int]] = np.asarray(result.top_ids[start:stop, :num_top]).tolist()
    top_values: list[list[float]] = np.asarray(result.top_logprobs[start:stop, :num_top]).tolist()
    return [
        TokenLogprob(token_id, logprob, tuple(zip(tops, top_logprobs, strict=True)))
        for token_id, logprob, tops, top_logprobs in zip(ids, values, top_ids, top_values, strict=True)
    ]
