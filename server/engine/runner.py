"""The "run" of schedule, run, postprocess: one plan through the core.

A step without grammars is one core call. With grammars the masks are filled on a worker thread while the forward pass
runs (both off the GIL), then the sampler runs. A grammar that raises ends its own sequence, not its neighbours'; one
that raises on the way of a guess that may be wrong only ends the draft before it.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from server.engine.batch import StepArrays, StepBuffers
from server.engine.core_api import REJECT, Core
from server.engine.params import Grammar
from server.engine.sequence import Sequence
from server.engine.step import StepPlan, StepResult

log = logging.getLogger(__name__)


class Runner:
    def __init__(self, core: Core, *, max_num_seqs: int, max_tokens: int, max_blocks: int) -> None:
        self._core = core
        self._masks = core.masks
        self._buffers = StepBuffers(core, max_num_seqs=max_num_seqs, max_tokens=max_tokens, max_blocks=max_blocks)
        self._mask_thread: ThreadPoolExecutor | None = None  # started by the first grammar

    def run(self, plan: StepPlan) -> StepResult:
        for seq in plan.admitted:
            self._set_sequence(seq)
        arrays = self._buffers.fill(plan)
        if not arrays.masked:
            self._core.step(*arrays.step)
            return arrays.result
        if self._mask_thread is None:
            self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="sterna-masks")
        filling = self._mask_thread.submit(self._fill_masks, arrays)
        try:
            self._core.forward(*arrays.forward)
        finally:
            filling.result()  # never leave it writing masks behind our back
        self._core.sample(*arrays.sample)
        return arrays.result

    def close(self) -> None:
        if self._mask_thread is not None:
            self._mask_thread.shutdown()

    def _fill_masks(self, arrays: StepArrays) -> None:
        for seq, first_row in arrays.masked:
            assert seq.grammar is not None
            ahead, draft = seq.grammar, seq.draft
            if draft.tokens:
                ahead = ahead.fork()
            walked = 0
            for row, place in enumerate(draft.rows, first_row):
                ahead.take(draft.tokens[walked:place])
                walked = place
                error = self._fill_mask(ahead, row)
                if error is None:
                    continue
                self._masks[row].fill(-1)  # the row is sampled with the others and thrown away
                if row == first_row:
                    log.error("sequence %d: %s", seq.seq_id, error)
                    seq.error = error
                else:
                    arrays.drafts[row - 1] = REJECT
                break

    def _fill_mask(self, grammar: Grammar, row: int) -> str | None:
        """Returns what is wrong."""
        mask = self._masks[row]
        mask.fill(0)
        try:
            grammar.fill_mask(mask)
        except (ValueError, RuntimeError) as error:  # what llguidance raises
            return f"the grammar failed: {error}"
        return None if mask.any() else "the grammar allows no token"

    def _set_sequence(self, seq: Sequence) -> None:
        """(Re)build the slot's sampling state; after a preemption the penalties count the output so far again."""
        params = seq.params
        token_ids = np.array(seq.token_ids, np.int32)
        # A grammar says where its answer may end; min_tokens on top of it could leave no token at all.
        is_blocking = params.min_tokens > 0 and seq.grammar is None
        self._core.set_sequence(
            seq.slot,
            token_ids[: seq.num_prompt],
            token_ids[seq.num_prompt :],
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            seq.seed,
            params.choice,
            np.array(list(params.logit_bias), np.int32),
            np.array(list(params.logit_bias.values()), np.float32),
            np.array(sorted(seq.end_token_ids) if is_blocking else [], np.int32),
            seq.num_prompt + params.min_tokens if is_blocking else 0,
        )
