"""The engine alone, timed: prefill of 512 tokens and greedy decode at batch 1, 8 and 32.

Measures full forward passes: prefix cache and speculation do not exist at this level, prompts are distinct random
tokens of equal length, KV is 16 bits, the head has the file's precision, and every step samples every row. The keys are
those of the llama.cpp script that it is compared with. Not covered: scheduling, HTTP and detokenization.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import _sterna
from quant.model_file import open_model
from server.engine.weights import load_core

_PREFILL = 512
_PROMPT = 6
_STEPS = 64
_CONTEXT = 256
"""Tokens reserved for each sequence of the decode runs, as in the llama.cpp script."""
_BATCHES = (1, 8, 32)
_REPEATS = 3


def _i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


class EngineTimer:
    """Drives a core without a scheduler: sequence s owns blocks [s * n, (s + 1) * n)."""

    def __init__(
        self, core: "_sterna.Core", blocks_a_sequence: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._core = core
        self._blocks = blocks_a_sequence
        self._clock = clock
        self._rng = np.random.default_rng(0)
        self._made: dict[int, list[np.ndarray]] = {}
        for slot in range(core.max_num_seqs):
            self._greedy(slot)

    def _greedy(self, slot: int) -> None:
        none, no_floats = np.empty(0, np.int32), np.empty(0, np.float32)
        self._core.set_sequence(slot, none, none, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, none, no_floats, none, 0)

    def step(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray,
        lora_slots: np.ndarray | None = None,
    ) -> np.ndarray:
        """Row starts[s] is sequence s's first, at positions[s]; the rows `last` are sampled, one for each sequence.

        The result is overwritten by the next step of as many sequences.
        """
        slots, tables, none, *outputs = self._arrays(len(positions))
        loras = none if lora_slots is None else lora_slots
        ends = positions + starts[1:] - starts[:-1]
        self._core.step(tokens, starts, positions, tables, loras, last, slots, ends, none, none, none, *outputs)
        return outputs[1]

    def _arrays(self, count: int) -> list[np.ndarray]:
        """Slots, block tables, -1s, masks in use, and the outputs of a step of `count` sequences, made once.

        Python between two steps runs from memory, since the weights have passed through the caches: making these anew
        took 0.1 ms of the default model's 4 ms (one sequence).
        """
        if count not in self._made:
            slots = np.arange(count, dtype=np.int32)
            tables = slots[:, None] * self._blocks + np.arange(self._blocks, dtype=np.int32)[None]
            self._made[count] = [
                slots,
                np.ascontiguousarray(tables, np.int32),
                np.full(count, -1, np.int32),
                np.zeros(count, np.uint8),
                np.empty(count, np.int32),
                np.empty(count, np.float32),
                np.empty((count, 20), np.int32),
                np.empty((count, 20), np.float32),
            ]
        return self._made[count]

    def prefill(self, tokens: int) -> float:
        """Tokens per second of one prompt, in steps of at most `max_batch_tokens`, as the scheduler cuts it."""
        ids = self._rng.integers(0, self._core.vocab_size, tokens).astype(np.int32)
        start = self._clock()
        for at in range(0, tokens, self._core.max_batch_tokens):
            piece = ids[at : at + self._core.max_batch_tokens]
            self.step(piece, _i32(0, len(piece)), _i32(at), _i32(len(piece) - 1))
        return tokens / (self._clock() - start)

    def start(self, batch: int) -> np.ndarray:
        """`batch` sequences of a short prompt of their own; their next tokens."""
        prompts = self._rng.integers(0, self._core.vocab_size, (batch, _PROMPT)).astype(np.int32)
        starts = np.arange(batch + 1, dtype=np.int32) * _PROMPT
        return self.step(prompts.reshape(-1), starts, np.zeros(batch, np.int32), starts[1:] - 1)

    def decode(
        self, batch: int, steps: int = _STEPS, *, context: int | None = None, lora_slots: np.ndarray | None = None
    ) -> float:
        """Tokens per second of `batch` sequences that decode together.

        They begin with a short prompt, or go on where `context` tokens have been filled in before.
        """
        starts = np.arange(batch + 1, dtype=np.int32)
        tokens = self.start(batch) if context is None else starts[1:]
        positions = np.full(batch, _PROMPT if context is None else context, np.int32)
        start = self._clock()
        for step in range(steps):
            tokens = self.step(tokens, starts, positions + step, starts[:-1], lora_slots)
        return batch * steps / (self._clock() - start)


def run_bench(
    model: str | Path, *, threads: int, isa: str = "auto", progress: Callable[[str], None] | None = None
) -> dict[str, object]:
    """Medians of three, tokens per second. Raises ModelFileError for a file that cannot be served."""
    say = progress or (lambda _: None)
    file = open_model(model)
    blocks = _CONTEXT // 16
    say("loading")
    core = load_core(
        file,
        isa=isa,
        num_threads=threads,
        num_blocks=max(_BATCHES) * blocks,
        max_num_seqs=max(_BATCHES),
        max_batch_tokens=_PREFILL,
    )
    result: dict[str, object] = {"engine": "sterna", "model": str(model), "threads": threads}
    say("prefill 512")
    timer = EngineTimer(core, _PREFILL // 16)
    timer.prefill(_PREFILL)  # the first pass touches buffers for the first time
    result["prefill512_tok_s"] = round(statistics.median(timer.prefill(_PREFILL) for _ in range(_REPEATS)), 1)
    for batch in _BATCHES:
        say(f"decode at batch {batch}")
        timer = EngineTimer(core, blocks)
        result[f"decode_b{batch}_tok_s"] = round(statistics.median(timer.decode(batch) for _ in range(_REPEATS)), 1)
    file.close()
    return result
