"""The "run" of schedule, run, postprocess: one plan through the core.

A step without grammars is one core call. With grammars the masks are filled on a worker thread while the forward pass
runs (both off the GIL), then the sampler runs. A grammar that raises ends its own sequence, not its neighbours'.
"""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from server.engine.batch import StepBuffers
from server.engine.core_api import Core
from server.engine.scheduler import StepPlan, StepResult
from server.engine.sequence import Sequence

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
        filling = self._mask_thread.submit(self._fill_masks, arrays.masked)
        try:
            self._core.forward(*arrays.forward)
        finally:
            filling.result()  # never leave it writing masks behind our back
        self._core.sample(*arrays.sample)
        return arrays.result

    def close(self) -> None:
        if self._mask_thread is not None:
            self._mask_thread.shutdown()

    def _fill_masks(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            assert seq.grammar is not None
            mask = self._masks[seq.slot]
            mask.fill(0)
            try:
                seq.grammar.fill_mask(mask)
            except (ValueError, RuntimeError) as error:  # what llguidance raises
                log.exception("grammar of sequence %d failed", seq.seq_id)
                seq.error = f"the grammar failed: {error}"
            if seq.error is None and not mask.any():
                seq.error = "the grammar allows no token"
            if seq.error is not None:
                mask.fill(-1)  # the row is sampled with the others and thrown away

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
