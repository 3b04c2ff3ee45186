"""Which sequences run in the next step, and what the step made of them: schedule, (run), postprocess.

Continuous batching with chunked prefill: decodes first, then prompt chunks up to the token budget, in order of arrival.
A sequence gets blocks for all of its present tokens at admission, so only decodes can run out of blocks; then the
latest arrival is preempted, and starts over later with its output as part of its prompt. The earliest arrival can
therefore always go on, and nothing waits for ever.

The only file that changes `Sequence.state`. Not covered: arrays and the core (batch.py, engine.py).
"""

from bisect import insort

from server.engine.block_manager import BlockManager
from server.engine.drafting import Drafter
from server.engine.params import EngineOutput, FinishReason
from server.engine.sequence import NO_DRAFT, Sequence, SequenceState
from server.engine.stats import Counters
from server.engine.step import StepPlan, StepResult, token_logprobs

MAX_MIXED_PREFILL_TOKENS = 64
"""Prompt tokens in a step that also decodes, and drafts where several sequences do. 64 rows take a few times as long as
a decode step of a few rows (weights are read once either way), which bounds the gap between two tokens of a running
answer; without decodes the whole budget is used."""


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
        drafter: Drafter | None = None,
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
        self._drafter = drafter
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
        decodes = self._pick_decodes()
        budget, rows = self._plan_decodes(plan, decodes)
        if decodes:
            budget = min(budget, self._max_mixed_prefill_tokens)
        for seq in self.running:
            if budget == 0 or rows == 0:
                break
            if seq.num_uncomputed > 1:
                budget, rows = self._add_chunk(plan, seq, budget, rows)
        if self.waiting and budget and rows:
            self._admit(plan, budget, rows)
        assert plan.sequences or not self.has_work, "the scheduler is stuck"
        return plan

    def _pick_decodes(self) -> list[Sequence]:
        """Every running sequence with one token to go; `running` may shrink from its end while we walk it."""
        running, block_size = self.running, self._blocks.block_size
        decodes: list[Sequence] = []
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
            decodes.append(seq)
        return decodes

    def _plan_decodes(self, plan: StepPlan, decodes: list[Sequence]) -> tuple[int, int]:
        """First those with their one token, then those with a draft; what is left of both budgets.

        Forced tokens always seem to pay, but every other sequence waits for them as for a prompt's chunk: so both share
        one allowance, of which drafts get half while prompts may want theirs.
        """
        budget, rows = self._max_tokens - len(decodes), self._max_logit_rows - len(decodes)
        kept = 0
        if len(decodes) > 1:
            budget = min(budget, self._max_mixed_prefill_tokens)
            kept = (budget + 1) // 2 if self.waiting or len(decodes) < len(self.running) else 0
        num_drafted = 0
        drafted: list[Sequence] = []
        pays = False
        if self._drafter is not None:
            self._drafter.begin_step(len(decodes))
            pays = self._drafter.pays
        for seq in decodes:
            room = budget - kept - num_drafted
            num_tokens, num_rows = self._draft(seq, room, rows) if pays or seq.grammar is not None else (0, 0)
            if num_tokens:
                drafted.append(seq)
                num_drafted, rows = num_drafted + num_tokens, rows - num_rows
            else:
                plan.add(seq, 1, 0)
        plan.num_decodes = len(plan.sequences)
        plan.num_decode_rows = len(decodes) + num_drafted
        for seq in drafted:
            plan.add(seq, 1, 0)
        return budget - num_drafted, rows

    def _draft(self, seq: Sequence, budget: int, rows: int) -> tuple[int, int]:
        """Give `seq` a draft, and the blocks for it; returns its tokens, and its logit rows but the one there was."""
        if self._drafter is None:
            return 0, 0
        room = min(budget, seq.max_length - len(seq.token_ids) - 1)
        # A draft takes no block that somebody else may need in one of the next 16 steps: it must not cost a preemption.
        num_spare = max(self._blocks.num_available - len(self.running), 0)
        size = self._blocks.block_size
        room = min(room, (len(seq.blocks) + num_spare) * size - len(seq.token_ids))
        seq.draft = draft = self._drafter.draft(seq, room, rows)
        while len(seq.blocks) * size < len(seq.token_ids) + len(draft.tokens):
            self._blocks.append_block(seq)
        return len(draft.tokens), len(draft.rows) - 1

    def _add_chunk(self, plan: StepPlan, seq: Sequence, budget: int, rows: int) -> tuple[int, int]:
        """Add as much of `seq`'s uncomputed tokens as fits; return what is left of both budgets."""
        num_tokens = min(seq.num_uncomputed, budget)
        num_scores = seq.num_score_rows(num_tokens)
        if num_scores and num_scores + 1 > rows:
            num_tokens = min(num_tokens, rows)  # at most one logit row a token
            num_scores = seq.num_score_rows(num_tokens)
        plan.add(seq, num_tokens, num_scores)
        plan.has_prompts = True
        budget, rows = budget - num_tokens, rows - num_scores
        if num_tokens < seq.num_uncomputed:
            return budget, rows
        num_drafted, num_rows = self._draft(seq, budget, rows - 1)
        return budget - num_drafted, rows - 1 - num_rows

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
        row = 0
        for seq, num_tokens, num_scores in zip(plan.sequences, plan.num_tokens, plan.num_score_rows, strict=True):
            if num_scores:
                assert seq.prompt_logprobs is not None
                num_top = seq.params.num_prompt_logprobs
                assert num_top is not None
                seq.prompt_logprobs += token_logprobs(result, row, row + num_scores, num_top)
                row += num_scores
            seq.num_computed += num_tokens
            if seq.num_computed < len(seq.token_ids):
                self._publish(seq)
                continue  # in the middle of its prompt
            draft, seq.draft = seq.draft, NO_DRAFT
            if seq.error is not None:
                outputs.append((seq, self._fail(seq, draft.tokens[: draft.rows[0]])))
            elif draft is NO_DRAFT:
                outputs.append((seq, self._take_tokens(seq, tokens[row : row + 1], result, row)))
            else:
                assert self._drafter is not None
                taken = draft.held(tokens[row : row + len(draft.rows)])
                outputs.append((seq, self._take_tokens(seq, taken, result, row)))
                self._drafter.learn(seq, draft, taken)
            row += len(draft.rows)
        assert row == len(tokens)

    def _publish(self, seq: Sequence) -> None:
        if seq.num_computed >= (seq.num_published + 1) * self._blocks.block_size:
            self._blocks.publish(seq)

    def _take_tokens(self, seq: Sequence, tokens: list[int], result: StepResult, row: int) -> EngineOutput:
        """Append `tokens` up to an end. All but the last have been computed too."""
        reason: FinishReason | None = None
        num_before = len(seq.token_ids)
        for token in tokens:
            seq.token_ids.append(token)
            if token in seq.end_token_ids:
                reason = "stop"
            elif seq.grammar is not None and not seq.grammar.advance(token):
                reason, seq.error = "error", f"the grammar does not accept token {token}"
            elif len(seq.token_ids) >= seq.max_length:
                reason = "length"
            if reason is not None:
                break
        num_taken = len(seq.token_ids) - num_before
        seq.num_computed += num_taken - 1
        self._publish(seq)
        self._counters.generated_tokens += num_taken
        logprobs = None
        if seq.params.num_logprobs is not None:
            logprobs = token_logprobs(result, row, row + num_taken, seq.num_top)
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        if reason is not None:
            self._finish(seq, reason)
        return EngineOutput(
            token_ids=tuple(tokens[:num_taken]),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=token if reason == "stop" else None,
            error=seq.error,
            num_cached_tokens=seq.num_cached_tokens,
        )

    def _fail(self, seq: Sequence, tokens: list[int]) -> EngineOutput:
        """Its grammar failed while the forward pass ran: what was sampled is meaningless, `tokens` were forced."""
        self._finish(seq, "error")
        return EngineOutput(
            tuple(tokens), finish_reason="error", error=seq.error, num_cached_tokens=seq.num_cached_tokens
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
