"""Types of the C++ extension (server/engine/core/binding.cpp). All work runs with the GIL released."""

from array import array

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int32]
_Floats = NDArray[np.float32]

def available_isas() -> list[str]: ...
def uniform(seed: int, choice: int, position: int) -> float: ...
def probe_dot(isa: str, rounds: int) -> int:
    """int8 multiply-adds that were done, from registers."""

def probe_read(data: NDArray[np.uint8], isa: str, repeat: int = 1) -> int:
    """The sum of all words: reads the array from its beginning to its end."""

def find_match(tokens: _Ints | array[int], min_length: int, max_length: int) -> tuple[int, int]:
    """(index of the token after the longest, then latest, earlier occurrence of the last tokens or -1, its length)."""

def quantize_activations(x: _Floats, isa: str = "auto", one_scale: bool = False) -> tuple[_Floats, _Floats]: ...

class Matrix:
    """One packed matrix on its own, for kernel tests and benchmarks."""

    def __init__(
        self, ggml_type: int, data: NDArray[np.uint8], rows: int, cols: int, row_map: _Ints | None = None
    ) -> None: ...
    def to_float(self) -> _Floats: ...
    def matmul(self, x: _Floats, isa: str = "auto", group: int = 1, repeat: int = 1) -> _Floats: ...

class Model:
    def __init__(
        self,
        *,
        num_layers: int,
        hidden: int,
        ffn: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        vocab: int,
        rope_dim: int,
        max_positions: int,
        rms_norm_eps: float,
        rope_theta: float,
        rope_factors: list[float],
        squared_relu: bool,
        row_scales: bool,
        two_streams: bool,
        isa: str,
        num_threads: int,
    ) -> None: ...
    def add_matrix(
        self,
        name: str,
        layer: int,
        ggml_type: int,
        data: NDArray[np.uint8],
        rows: int,
        cols: int,
        row_map: _Ints | None = None,
    ) -> None: ...
    def add_vector(self, name: str, layer: int, data: _Floats) -> None: ...
    def finish(self) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...

class Core:
    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_logit_rows: int,
        max_loras: int,
    ) -> None: ...
    vocab_size: int
    mask_words: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_batch_tokens: int
    max_logit_rows: int
    max_loras: int
    masks: _Ints
    def logits(self, rows: int) -> _Floats: ...
    def set_sequence(
        self,
        slot: int,
        prompt_ids: _Ints,
        output_ids: _Ints,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: int,
        choice: int,
        bias_ids: _Ints,
        bias_values: _Floats,
        blocked_ids: _Ints,
        block_until: int,
    ) -> None: ...
    def forward(
        self,
        token_ids: _Ints,
        seq_starts: _Ints,
        seq_positions: _Ints,
        block_tables: _Ints,
        lora_slots: _Ints,
        logit_rows: _Ints,
    ) -> None: ...
    def sample(
        self,
        slots: _Ints,
        positions: _Ints,
        targets: _Ints,
        drafts: _Ints,
        num_top: _Ints,
        use_mask: NDArray[np.uint8],
        out_tokens: _Ints,
        out_logprobs: _Floats,
        out_top_ids: _Ints,
        out_top_logprobs: _Floats,
    ) -> None: ...
    def step(
        self,
        token_ids: _Ints,
        seq_starts: _Ints,
        seq_positions: _Ints,
        block_tables: _Ints,
        lora_slots: _Ints,
        logit_rows: _Ints,
        slots: _Ints,
        positions: _Ints,
        targets: _Ints,
        drafts: _Ints,
        num_top: _Ints,
        use_mask: NDArray[np.uint8],
        out_tokens: _Ints,
        out_logprobs: _Floats,
        out_top_ids: _Ints,
        out_top_logprobs: _Floats,
    ) -> None: ...
    def profile(self, is_on: bool, own_clock: bool = False) -> dict[str, float]:
        """Seconds by op since the last call, while on; on or off from now. `own_clock`: CPU time, for one thread."""

    def new_lora(self) -> Lora: ...
    def set_lora(self, lora_slot: int, lora: Lora) -> None: ...
    def clear_lora(self, lora_slot: int) -> None: ...

class Lora:
    @property
    def num_bytes(self) -> int: ...
    def add(self, layer_index: int, projection: str, a: _Floats, b: _Floats, scale: float) -> None: ...
