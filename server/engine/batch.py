"""A step's plan as the arrays that the core reads: preallocated, filled in place.

Decodes come first in a plan and are filled by comprehensions (one C-level assignment an array); prompt chunks, few a
step, by a loop. Shape letters as in core_api.py: T tokens, S sequences, R logit rows.
"""

from dataclasses import dataclass

import numpy as np

from server.engine.core_api import (
    MAX_TOP_LOGPROBS,
    NO_DRAFT_TOKEN,
    NO_TARGET,
    ByteArray,
    Core,
    FloatArray,
    IntArray,
)
from server.engine.sequence import Sequence
from server.engine.step import StepPlan, StepResult

ForwardArgs = tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]
SampleArgs = tuple[
    IntArray, IntArray, IntArray, IntArray, IntArray, ByteArray, IntArray, FloatArray, IntArray, FloatArray
]


@dataclass(slots=True)
class StepArrays:
    """Views into the buffers, good until the next `fill`."""

    forward: ForwardArgs
    sample: SampleArgs
    result: StepResult
    masked: list[tuple[Sequence, int]]
    """Sequences with a grammar that sample in this step, and their first row that does."""
    drafts: IntArray
    """(R,): the draft token that is sampled at each row, if any."""

    @property
    def step(self) -> tuple[*ForwardArgs, *SampleArgs]:
        return (*self.forward, *self.sample)


class StepBuffers:
    """Buffers for one core. `max_blocks`: blocks of the longest sequence; `max_tokens`: T of the largest step."""

    def __init__(self, core: Core, *, max_num_seqs: int, max_tokens: int, max_blocks: int) -> None:
        num_rows = core.max_logit_rows
        self._block_size = core.block_size
        self._tables = np.zeros((max_num_seqs, max_blocks), np.int32)  # by slot
        self._block_tables = np.zeros(max_num_seqs * max_blocks, np.int32)  # by row of the step
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._seq_starts = np.zeros(max_num_seqs + 1, np.int32)
        self._seq_positions = np.zeros(max_num_seqs, np.int32)
        self._seq_slots = np.zeros(max_num_seqs, np.int32)
        self._lora_slots = np.zeros(max_num_seqs, np.int32)
        self._logit_rows = np.zeros(num_rows, np.int32)
        self._slots = np.zeros(num_rows, np.int32)
        self._positions = np.zeros(num_rows, np.int32)
        self._targets = np.zeros(num_rows, np.int32)
        self._drafts = np.zeros(num_rows, np.int32)
        self._num_top = np.zeros(num_rows, np.int32)
        self._use_mask = np.zeros(num_rows, np.uint8)
        self._out_tokens = np.zeros(num_rows, np.int32)
        self._out_logprobs = np.zeros(num_rows, np.float32)
        self._out_top_ids = np.zeros((num_rows, MAX_TOP_LOGPROBS), np.int32)
        self._out_top_logprobs = np.zeros((num_rows, MAX_TOP_LOGPROBS), np.float32)
        self._row_numbers = np.arange(max(num_rows, max_num_seqs + 1), dtype=np.int32)

    def fill(self, plan: StepPlan) -> StepArrays:
        for seq in plan.admitted:
            self._tables[seq.slot, : len(seq.blocks)] = seq.blocks
        num_seqs, num_decodes = len(plan.sequences), plan.num_decodes
        self._fill_decodes(plan.sequences[:num_decodes])
        masked = [(seq, row) for row, seq in enumerate(plan.sequences[:num_decodes]) if seq.use_mask]
        row = token = num_decodes
        for index in range(num_decodes, num_seqs):
            seq, num_tokens = plan.sequences[index], plan.num_tokens[index]
            num_scores = plan.num_score_rows[index]
            self._fill_chunk(seq, index, token, num_tokens)
            row = self._fill_scores(seq, row, token, num_tokens, num_scores)
            token += num_tokens
            if num_tokens == seq.num_uncomputed:
                if seq.use_mask:
                    masked.append((seq, row))
                row = self._fill_draft(seq, row, token)
                token += len(seq.draft.tokens)
        self._seq_starts[num_seqs] = token
        return self._views(plan, num_seqs, token, row, masked)

    def _fill_decodes(self, decodes: list[Sequence]) -> None:
        """Sequence, token and logit row number i are all the same for a decode."""
        count = len(decodes)
        if count == 0:
            return
        block_size, tables = self._block_size, self._tables
        for seq in decodes:
            if seq.num_computed % block_size == 0:  # its first token in a block: the block may be new
                tables[seq.slot, len(seq.blocks) - 1] = seq.blocks[-1]
        slots = [seq.slot for seq in decodes]
        self._token_ids[:count] = [seq.token_ids[-1] for seq in decodes]
        self._seq_starts[:count] = self._row_numbers[:count]
        self._seq_positions[:count] = [seq.num_computed for seq in decodes]
        self._seq_slots[:count] = slots
        self._lora_slots[:count] = [seq.lora_slot for seq in decodes]
        self._logit_rows[:count] = self._row_numbers[:count]
        self._slots[:count] = slots
        np.add(self._seq_positions[:count], 1, out=self._positions[:count])
        self._targets[:count] = NO_TARGET
        self._drafts[:count] = NO_DRAFT_TOKEN
        self._num_top[:count] = [seq.num_top for seq in decodes]
        self._use_mask[:count] = [seq.use_mask for seq in decodes]

    def _fill_chunk(self, seq: Sequence, index: int, token: int, num_tokens: int) -> None:
        start = seq.num_computed
        self._token_ids[token : token + num_tokens] = seq.token_ids[start : start + num_tokens]
        self._seq_starts[index] = token
        self._seq_positions[index] = start
        self._seq_slots[index] = seq.slot
        self._lora_slots[index] = seq.lora_slot

    def _fill_scores(self, seq: Sequence, row: int, token: int, num_tokens: int, num_scores: int) -> int:
        """Logit rows of one chunk that score its prompt tokens; returns the next row."""
        end = seq.num_computed + num_tokens
        if num_scores:
            last = min(end, seq.num_prompt - 1)  # the last token scored
            first = last - num_scores + 1
            rows = slice(row, row + num_scores)
            self._logit_rows[rows] = np.arange(num_scores, dtype=np.int32) + (token + first - 1 - seq.num_computed)
            self._positions[rows] = np.arange(first, last + 1, dtype=np.int32)
            self._targets[rows] = seq.token_ids[first : last + 1]
            self._drafts[rows] = NO_DRAFT_TOKEN
            self._slots[rows] = seq.slot
            assert seq.params.num_prompt_logprobs is not None
            self._num_top[rows] = seq.params.num_prompt_logprobs
            self._use_mask[rows] = 0
            row += num_scores
        return row

    def _fill_draft(self, seq: Sequence, row: int, token: int) -> int:
        """The draft's tokens from `token` on, its blocks, and the rows that sample: before each guess, and the last."""
        draft, first_block = seq.draft, seq.num_computed // self._block_size
        self._tables[seq.slot, first_block : len(seq.blocks)] = seq.blocks[first_block:]
        self._token_ids[token : token + len(draft.tokens)] = draft.tokens
        rows = slice(row, row + len(draft.rows))
        offsets = np.array(draft.rows, np.int32)
        self._logit_rows[rows] = offsets + (token - 1)
        self._positions[rows] = offsets + len(seq.token_ids)
        self._targets[rows] = NO_TARGET
        self._drafts[rows] = [*(draft.tokens[guess.index] for guess in draft.guesses), NO_DRAFT_TOKEN]
        self._slots[rows] = seq.slot
        self._num_top[rows] = seq.num_top
        self._use_mask[rows] = seq.use_mask
        return rows.stop

    def _views(
        self, plan: StepPlan, num_seqs: int, num_tokens: int, num_rows: int, masked: list[tuple[Sequence, int]]
    ) -> StepArrays:
        width = max(len(seq.blocks) for seq in plan.sequences)
        block_tables = self._block_tables[: num_seqs * width].reshape(num_seqs, width)
        block_tables[...] = self._tables[self._seq_slots[:num_seqs], :width]
        result = StepResult(
            self._out_tokens[:num_rows],
            self._out_logprobs[:num_rows],
            self._out_top_ids[:num_rows],
            self._out_top_logprobs[:num_rows],
        )
        return StepArrays(
            forward=(
                self._token_ids[:num_tokens],
                self._seq_starts[: num_seqs + 1],
                self._seq_positions[:num_seqs],
                block_tables,
                self._lora_slots[:num_seqs],
                self._logit_rows[:num_rows],
            ),
            sample=(
                self._slots[:num_rows],
                self._positions[:num_rows],
                self._targets[:num_rows],
                self._drafts[:num_rows],
                self._num_top[:num_rows],
                self._use_mask[:num_rows],
                result.tokens,
                result.logprobs,
                result.top_ids,
                result.top_logprobs,
            ),
            result=result,
            masked=masked,
            drafts=self._drafts[:num_rows],
        )
