"""What the C++ core offers the Python half: the forward pass, the sampler and the LoRA slots.

A Protocol, so that the scheduler is tested against a fake that keeps its own KV cells. Arrays are NumPy, C-contiguous,
int32 unless said otherwise, owned and reused by the caller; every call releases the GIL; a row's result never depends
on its neighbours. Shape letters: T rows (tokens) of a step, S sequences in it, R rows whose logits are computed.

Not covered: which sequences run (scheduler.py) and where their blocks lie (block_manager.py).
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

MAX_TOP_LOGPROBS = 20  # width of out_top_*: OpenAI's limit for top_logprobs
NO_TARGET = -1  # in `targets`: sample this row instead of scoring a given token
NO_DRAFT_TOKEN = -1  # in `drafts`: no row leans on this one
REJECT = 2**31 - 1  # in `drafts`: what no row samples
NO_LOGPROBS = -1  # in `num_top`
NO_ADAPTER = -1  # in `lora_slots`


class Lora(Protocol):
    """One adapter, packed as the core computes with it. Filled by any one thread, also while the core steps."""

    def add(self, layer_index: int, projection: str, a: FloatArray, b: FloatArray, scale: float, /) -> None:
        """Set one projection: `a` (r, in), `b` (out, r), rows in Hugging Face order."""


class Core(Protocol):
    """One model with its KV store of `num_blocks` blocks and its per-slot sampling state."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def mask_words(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_batch_tokens(self) -> int: ...
    @property
    def max_logit_rows(self) -> int: ...
    @property
    def max_loras(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def masks(self) -> IntArray:
        """(max_logit_rows, mask_words), writable: row = logit row of the step, bit = allowed token."""

    def set_sequence(
        self,
        slot: int,
        prompt_ids: IntArray,
        output_ids: IntArray,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: int,
        choice: int,
        bias_ids: IntArray,
        bias_values: FloatArray,
        blocked_ids: IntArray,
        block_until: int,
        /,
    ) -> None:
        """Start `slot` over. `blocked_ids` are masked while the sampled token's position < `block_until`.

        The core copies what it needs and counts the tokens that it samples for the penalties from here on.
        """

    def forward(
        self,
        token_ids: IntArray,
        seq_starts: IntArray,
        seq_positions: IntArray,
        block_tables: IntArray,
        lora_slots: IntArray,
        logit_rows: IntArray,
        /,
    ) -> None:
        """Write the KV of T tokens and compute the logits of `logit_rows` (R, ascending, R may be 0).

        `token_ids` (T,); `seq_starts` (S+1,) row offsets; `seq_positions` (S,) position of each sequence's first row;
        `block_tables` (S, W), W >= the longest sequence's blocks; `lora_slots` (S,).
        """

    def sample(
        self,
        slots: IntArray,
        positions: IntArray,
        targets: IntArray,
        drafts: IntArray,
        num_top: IntArray,
        use_mask: ByteArray,
        out_tokens: IntArray,
        out_logprobs: FloatArray,
        out_top_ids: IntArray,
        out_top_logprobs: FloatArray,
        /,
    ) -> None:
        """Sample or score the rows of the last `forward`: (R,) each, `out_top_*` (R, 20).

        `positions` is the absolute position of the token being sampled or scored. `drafts` is the token that the next
        row, of the same slot, was computed with, or NO_DRAFT_TOKEN: when another one is sampled, that row and those
        that lean on it are not sampled, and get token -1.
        """

    def step(
        self,
        token_ids: IntArray,
        seq_starts: IntArray,
        seq_positions: IntArray,
        block_tables: IntArray,
        lora_slots: IntArray,
        logit_rows: IntArray,
        slots: IntArray,
        positions: IntArray,
        targets: IntArray,
        drafts: IntArray,
        num_top: IntArray,
        use_mask: ByteArray,
        out_tokens: IntArray,
        out_logprobs: FloatArray,
        out_top_ids: IntArray,
        out_top_logprobs: FloatArray,
        /,
    ) -> None:
        """`forward` then `sample` in one call."""

    def new_lora(self) -> Lora:
        """An adapter without matrices, to be filled and put into a slot."""

    def set_lora(self, lora_slot: int, lora: Any, /) -> None:
        """Put what `new_lora` gave into a slot, whose content it replaces; it cannot be changed any more.

        Any thread, also during a step, if no sequence of the step uses the slot.
        """

    def clear_lora(self, lora_slot: int, /) -> None: ...
