"""A core without a model, for tests: its logits are a hash of the KV cells that the block table reaches.

Each cell of the fake KV store keeps (token, position, adapter content). A row's logits are drawn from the digest of
every cell from position 0 on, found through the block table, so a wrong table, a stale block, a prefix shared too early
or with the wrong adapter changes the output. `reference_tokens` is the slow twin: the same answer from the plain token
list, without engine, blocks or batch.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from server.engine.params import Grammar, SamplingParams
from tests.patience import PATIENCE_SECONDS

NO_CELL = (-1, -1, "never written")
Cell = tuple[int, int, str]


def history_logits(cells: Iterable[Cell], vocab_size: int) -> np.ndarray:
    digest = blake2b(repr(list(cells)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(vocab_size).astype(np.float32) * 3


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


@dataclass
class FakeSampler:
    """One slot's sampling state, fed by set_sequence and by what it sampled since."""

    prompt: set[int]
    outputs: Counter[int]
    temperature: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    choice: int
    bias: dict[int, float]
    blocked: list[int]
    block_until: int

    def sample(self, logits: np.ndarray, position: int, allowed: np.ndarray | None) -> int:
        logits = logits.astype(np.float64)
        for token in self.prompt | set(self.outputs):
            logits[token] *= 1 / self.repetition_penalty if logits[token] > 0 else self.repetition_penalty
        for token, count in self.outputs.items():
            logits[token] -= self.presence_penalty + self.frequency_penalty * count
        for token, value in self.bias.items():
            logits[token] += value
        if position < self.block_until:
            logits[self.blocked] = -np.inf
        if allowed is not None:
            logits[~allowed] = -np.inf
        if self.temperature > 0:
            key = [self.seed & 0xFFFFFFFF, self.seed >> 32, self.choice, position]
            logits = logits / self.temperature + np.random.default_rng(key).gumbel(size=logits.size)
        token = int(np.argmax(logits))
        assert np.isfinite(logits[token]), "every token is masked"
        self.outputs[token] += 1
        return token


@dataclass
class StepRecord:
    """What one forward call was asked for."""

    num_tokens: list[int]
    positions: list[int]
    lora_slots: list[int]
    logit_rows: list[int]


@dataclass
class FakeCore:
    vocab_size: int = 61
    max_num_seqs: int = 8
    max_batch_tokens: int = 64
    max_logit_rows: int = 16
    num_blocks: int = 64
    block_size: int = 4
    max_loras: int = 4
    context: int | None = None
    """When given, logits hang almost only on the last so many tokens, so that greedy answers fall into loops."""
    fail_steps: int = 0
    """The next so many steps raise."""
    gate: threading.Event | None = None
    """When given, every forward call waits for it: the test decides when the engine's step ends."""
    steps: list[StepRecord] = field(default_factory=list)
    lora_threads: set[str] = field(default_factory=set)
    """Those that packed an adapter or filled a slot."""
    threads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.mask_words = -(-self.vocab_size // 32)
        self.masks = np.zeros((self.max_logit_rows, self.mask_words), np.int32)
        self.cells: list[list[Cell]] = [[NO_CELL] * self.block_size for _ in range(self.num_blocks)]
        self.samplers: dict[int, FakeSampler] = {}
        self.loras: dict[int, str] = {}
        self._logits: np.ndarray | None = None

    # -- the Core protocol ------------------------------------------------------------------------------------------

    def set_sequence(
        self,
        slot,
        prompt_ids,
        output_ids,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        choice,
        bias_ids,
        bias_values,
        blocked_ids,
        block_until,
    ) -> None:
        assert 0 <= slot < self.max_num_seqs
        assert prompt_ids.dtype == output_ids.dtype == bias_ids.dtype == blocked_ids.dtype == np.int32
        assert bias_values.dtype == np.float32
        assert 0 <= seed < 2**64
        self.samplers[slot] = FakeSampler(
            set(prompt_ids.tolist()),
            Counter(output_ids.tolist()),
            temperature,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed,
            choice,
            dict(zip(bias_ids.tolist(), bias_values.tolist(), strict=True)),
            blocked_ids.tolist(),
            block_until,
        )

    def step(self, *args) -> None:
        self.forward(*args[:6])
        self.sample(*args[6:])

    def forward(self, token_ids, seq_starts, seq_positions, block_tables, lora_slots, logit_rows) -> None:
        arrays = (token_ids, seq_starts, seq_positions, block_tables, lora_slots, logit_rows)
        for given in arrays:
            assert given.dtype == np.int32
            assert given.flags.c_contiguous
        num_seqs = len(seq_positions)
        assert 0 < num_seqs <= self.max_num_seqs
        assert len(token_ids) <= self.max_batch_tokens
        assert len(logit_rows) <= self.max_logit_rows
        assert len(seq_starts) == num_seqs + 1 == len(lora_slots) + 1 == len(block_tables) + 1
        assert seq_starts[0] == 0
        assert seq_starts[-1] == len(token_ids)
        assert (np.diff(seq_starts) > 0).all()
        assert (np.diff(logit_rows) > 0).all()
        assert ((token_ids >= 0) & (token_ids < self.vocab_size)).all()
        self.steps.append(
            StepRecord(np.diff(seq_starts).tolist(), seq_positions.tolist(), lora_slots.tolist(), logit_rows.tolist())
        )
        self.threads.add(threading.current_thread().name)
        if self.gate is not None and not self.gate.wait(PATIENCE_SECONDS):
            raise TimeoutError("the test never opened the gate")
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("the fake core was told to fail")
        self._write(token_ids, seq_starts, seq_positions, block_tables, lora_slots)
        self._logits = np.stack(
            [self._row_logits(int(row), seq_starts, seq_positions, block_tables) for row in logit_rows]
            or [np.zeros(self.vocab_size, np.float32)]
        )[: len(logit_rows)]

    def _write(self, token_ids, seq_starts, seq_positions, block_tables, lora_slots) -> None:
        written: dict[int, int] = {}
        reached: list[set[int]] = []
        for seq in range(len(seq_positions)):
            lora = self.loras[int(lora_slots[seq])] if lora_slots[seq] >= 0 else ""
            end = seq_positions[seq] + seq_starts[seq + 1] - seq_starts[seq]
            reached.append(set(block_tables[seq, : -(-int(end) // self.block_size)].tolist()))
            assert len(reached[-1]) == -(-int(end) // self.block_size), "a block twice in one table"
            for row in range(seq_starts[seq], seq_starts[seq + 1]):
                position = int(seq_positions[seq] + row - seq_starts[seq])
                block = int(block_tables[seq, position // self.block_size])
                assert written.setdefault(block, seq) == seq, "two sequences write one block"
                self.cells[block][position % self.block_size] = (int(token_ids[row]), position, lora)
        for block, writer in written.items():
            assert not any(block in blocks for seq, blocks in enumerate(reached) if seq != writer), "a shared write"

    def _row_logits(self, row, seq_starts, seq_positions, block_tables) -> np.ndarray:
        seq = int(np.searchsorted(seq_starts, row, side="right")) - 1
        last = int(seq_positions[seq] + row - seq_starts[seq])
        table = block_tables[seq].tolist()
        size = self.block_size
        cells = [self.cells[table[p // size]][p % size] for p in range(last + 1)]
        logits = history_logits(cells, self.vocab_size)
        if self.context is None:
            return logits
        recent = [(token, 0, lora) for token, _, lora in cells[-self.context :]]
        return history_logits(recent, self.vocab_size) + np.float32(0.02) * logits

    def sample(
        self,
        slots,
        positions,
        targets,
        drafts,
        num_top,
        use_mask,
        out_tokens,
        out_logprobs,
        out_top_ids,
        out_top_logprobs,
    ) -> None:
        assert self._logits is not None
        assert use_mask.dtype == np.uint8
        assert out_top_ids.shape == out_top_logprobs.shape == (len(slots), 20)
        for given in (slots, positions, targets, drafts, num_top, use_mask, out_tokens, out_logprobs):
            assert given.shape == (len(self._logits),)
        for row, logits in enumerate(self._logits):
            token = int(targets[row])
            if token < 0:
                if row and drafts[row - 1] >= 0:
                    assert slots[row] == slots[row - 1]
                    if out_tokens[row - 1] != drafts[row - 1]:
                        out_tokens[row] = -1
                        continue
                allowed = self._allowed(row) if use_mask[row] else None
                token = self.samplers[int(slots[row])].sample(logits, int(positions[row]), allowed)
            out_tokens[row] = token
            if num_top[row] >= 0:
                logprobs = log_softmax(logits)
                top = np.argsort(-logprobs, kind="stable")[: num_top[row]]
                out_logprobs[row] = logprobs[token]
                out_top_ids[row, : len(top)] = top
                out_top_logprobs[row, : len(top)] = logprobs[top]

    def _allowed(self, row: int) -> np.ndarray:
        bits = np.unpackbits(self.masks[row].view(np.uint8), bitorder="little")
        return bits[: self.vocab_size].astype(bool)

    def new_lora(self) -> "FakeLora":
        self.lora_threads.add(threading.current_thread().name)
        return FakeLora()

    def set_lora(self, lora_slot, lora) -> None:
        assert 0 <= lora_slot < self.max_loras
        self.loras[lora_slot] = lora.content
        self.lora_threads.add(threading.current_thread().name)

    def clear_lora(self, lora_slot) -> None:
        self.loras.pop(lora_slot, None)


class FakeLora:
    """`content` is what sets it apart."""

    def __init__(self) -> None:
        self.content = ""

    def add(self, layer_index, projection, a, b, scale) -> None:
        if not np.isfinite(scale):
            raise ValueError("scale is not finite")
        told = f"{self.content}/{layer_index}/{projection}/{scale}".encode()
        self.content = blake2b(told + a.tobytes() + b.tobytes()).hexdigest()


def lora_content(weights) -> str:
    """What `FakeCore` makes of these weights: the identity that its cells carry."""
    lora = FakeLora()
    for part in weights.projections:
        lora.add(part.layer, part.projection, part.a, part.b, part.scale)
    return lora.content


def reference_tokens(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    seed: int = 0,
    lora: str = "",
    end_token_ids: frozenset[int] = frozenset(),
    max_model_len: int = 10**9,
    vocab_size: int = 61,
    grammar: Grammar | None = None,
) -> list[int]:
    """The output that any correct engine over FakeCore must give, token by token from the whole history."""
    blocks = params.min_tokens > 0 and grammar is None
    sampler = FakeSampler(
        set(prompt),
        Counter(),
        params.temperature,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.seed if params.seed is not None else seed,
        params.choice,
        {token: float(np.float32(value)) for token, value in params.logit_bias.items()},
        sorted(end_token_ids) if blocks else [],
        len(prompt) + params.min_tokens if blocks else 0,
    )
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + params.max_tokens, max_model_len):
        logits = history_logits(((token, position, lora) for position, token in enumerate(tokens)), vocab_size)
        allowed = None
        if grammar is not None:
            mask = np.zeros(-(-vocab_size // 32), np.int32)
            grammar.fill_mask(mask)
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)
        tokens.append(sampler.sample(logits, len(tokens), allowed))
        if tokens[-1] in end_token_ids:
            break
        if grammar is not None:
            assert grammar.advance(tokens[-1])
    return tokens[len(prompt) :]


def reference_prompt_logprobs(prompt: Sequence[int], vocab_size: int = 61) -> list[float]:
    cells = [(token, position, "") for position, token in enumerate(prompt)]
    return [
        float(log_softmax(history_logits(cells[:position], vocab_size))[prompt[position]])
        for position in range(1, len(prompt))
    ]
