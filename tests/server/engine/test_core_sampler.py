"""The sampler inside the core: each parameter against its definition, and randomness that depends on nothing else."""

import numpy as np
import pytest

import _sterna
from tests.server.engine.core_twin import Shape, Twin, i32

VOCAB = 101
DEFAULTS = {
    "prompt_ids": np.empty(0, np.int32),
    "output_ids": np.empty(0, np.int32),
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 7,
    "choice": 0,
    "bias_ids": np.empty(0, np.int32),
    "bias_values": np.empty(0, np.float32),
    "blocked_ids": np.empty(0, np.int32),
    "block_until": 0,
}


class Sampler:
    """One core with the logits of one fixed row, sampled again and again at different positions."""

    def __init__(self, isa: str = "auto") -> None:
        self.core = Twin(Shape()).core(isa=isa, threads=2)
        self.raw = self.rewind(1)[0].astype(np.float64)

    def rewind(self, rows: int) -> np.ndarray:
        """Compute the same logits for `rows` sequences (a step samples in place)."""
        self.core.forward(
            np.full(rows, 5, np.int32),
            np.arange(rows + 1, dtype=np.int32),
            np.zeros(rows, np.int32),
            np.arange(rows, dtype=np.int32)[:, None],
            np.full(rows, -1, np.int32),
            np.arange(rows, dtype=np.int32),
        )
        return self.core.logits(rows)

    def draw(self, positions: np.ndarray, *, mask: np.ndarray | None = None, top: int = -1, target: int = -1, **params):
        rows = len(positions)
        self.rewind(rows)
        for slot in range(rows):
            self.core.set_sequence(slot, **(DEFAULTS | params))
            if mask is not None:
                self.core.masks[slot] = mask
        out = (
            np.empty(rows, np.int32),
            np.empty(rows, np.float32),
            np.empty((rows, 20), np.int32),
            np.empty((rows, 20), np.float32),
        )
        full = np.ones(rows, np.int32)
        self.core.sample(
            np.arange(rows, dtype=np.int32),
            positions.astype(np.int32),
            full * target,
            -full,
            full * top,
            np.full(rows, mask is not None, np.uint8),
            *out,
        )
        return out

    def tokens(self, count: int, **params) -> np.ndarray:
        parts = [self.draw(np.arange(at, at + 40), **params)[0] for at in range(0, count, 40)]
        return np.concatenate(parts)[:count]


@pytest.fixture(scope="module", params=_sterna.available_isas())
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(request.param)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def assert_distribution(tokens: np.ndarray, p: np.ndarray) -> None:
    """Chi-square over the bins with at least five expected, at five standard deviations."""
    counts = np.bincount(tokens, minlength=len(p))
    assert np.all(counts[p == 0] == 0)
    expected = p * len(tokens)
    big = expected >= 5
    statistic = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
    assert statistic < big.sum() + 5 * np.sqrt(2 * big.sum()) + 5


def test_greedy_is_argmax(sampler: Sampler) -> None:
    assert set(sampler.tokens(40, temperature=0.0)) == {int(sampler.raw.argmax())}


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_temperature(sampler: Sampler, temperature: float) -> None:
    assert_distribution(sampler.tokens(4000, temperature=temperature), softmax(sampler.raw / temperature))


def test_top_k_top_p_and_min_p_keep_what_they_define(sampler: Sampler) -> None:
    flat = 3.0
    p = softmax(sampler.raw / flat)
    order = np.argsort(-p, kind="stable")
    kept = np.zeros(VOCAB, bool)
    kept[order[:7]] = True
    assert_distribution(sampler.tokens(2000, temperature=flat, top_k=7), np.where(kept, p, 0) / p[kept].sum())
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1]
    kept = np.isin(np.arange(VOCAB), nucleus)
    assert_distribution(sampler.tokens(2000, temperature=flat, top_p=0.6), np.where(kept, p, 0) / p[kept].sum())
    kept = p >= 0.3 * p.max()
    assert_distribution(sampler.tokens(2000, temperature=flat, min_p=0.3), np.where(kept, p, 0) / p[kept].sum())
    assert set(sampler.tokens(200, temperature=flat, top_p=1e-6)) == {int(order[0])}


def test_penalties(sampler: Sampler) -> None:
    best = int(sampler.raw.argmax())
    history = {"prompt_ids": i32(3, best), "output_ids": i32(best, best, 9)}
    expected = sampler.raw.copy()
    for token in (3, best, 9):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    expected[best] -= 0.5 * 2 + 0.25
    expected[9] -= 0.5 + 0.25
    params = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.25, **history}
    assert_distribution(sampler.tokens(4000, temperature=2.0, **params), softmax(expected / 2))


def test_penalties_count_what_the_core_sampled_itself(sampler: Sampler) -> None:
    """Greedy with a huge frequency penalty never repeats: counts are kept between calls without set_sequence."""
    sampler.core.set_sequence(0, **(DEFAULTS | {"temperature": 0.0, "frequency_penalty": 1e6}))
    seen = []
    for position in range(30):
        sampler.rewind(1)
        token = np.empty(1, np.int32)
        minus = i32(-1)
        rest = (np.empty(1, np.float32), np.empty((1, 20), np.int32), np.empty((1, 20), np.float32))
        sampler.core.sample(i32(0), i32(position), minus, minus, minus, np.zeros(1, np.uint8), token, *rest)
        seen.append(int(token[0]))
    assert len(set(seen)) == 30


def test_drafts_that_hold_are_sampled_and_the_others_leave_no_trace(sampler: Sampler) -> None:
    """Rows of two sequences: each ends at the first token that is not its draft; penalties count what was sampled."""
    core, params = sampler.core, DEFAULTS | {"temperature": 1.5, "frequency_penalty": 0.7}

    def sample(slots: list[int], positions: list[int], drafts: list[int]) -> list[int]:
        rows, tokens = len(slots), np.empty(len(slots), np.int32)
        sampler.rewind(rows)
        minus = np.full(rows, -1, np.int32)
        rest = (np.empty(rows, np.float32), np.empty((rows, 20), np.int32), np.empty((rows, 20), np.float32))
        inputs = (i32(*slots), i32(*positions), minus, i32(*drafts), minus, np.zeros(rows, np.uint8))
        core.sample(*inputs, tokens, *rest)
        return tokens.tolist()

    def start(seed: int) -> None:
        for slot in (0, 1):
            core.set_sequence(slot, **(params | {"seed": seed + slot}))

    for seed in range(10):
        start(seed)
        plain = [sample([0, 1], [at, at], [-1, -1]) for at in range(6)]
        first, second = zip(*plain, strict=True)
        start(seed)
        wrong = (second[1] + 1) % VOCAB
        drafts = [first[0], first[1], first[2], -1, second[0], wrong, second[2], -1]
        got = sample([0] * 4 + [1] * 4, [0, 1, 2, 3, 0, 1, 2, 3], drafts)
        assert got == [*first[:4], *second[:2], -1, -1]
        assert sample([0, 1], [4, 2], [-1, -1]) == [first[4], second[2]]
    with pytest.raises(ValueError, match="a draft without a row after it"):
        sample([0, 1], [0, 0], [5, -1])


def test_bias_blocked_and_mask(sampler: Sampler) -> None:
    best = int(sampler.raw.argmax())
    bias = {"bias_ids": i32(4), "bias_values": np.array([100.0], np.float32)}
    assert set(sampler.tokens(40, **bias)) == {4}
    blocked = {"temperature": 0.0, "blocked_ids": i32(best), "block_until": 10}
    tokens = sampler.draw(np.arange(40), **blocked)[0]
    assert np.all(tokens[:10] != best)
    assert np.all(tokens[10:] == best)
    mask = np.zeros(sampler.core.mask_words, np.int32)
    for token in (0, 31, 32, 100):
        mask[token // 32] |= np.array(1 << (token % 32), np.uint32).astype(np.int32)
    kept = np.isin(np.arange(VOCAB), [0, 31, 32, 100])
    p = np.where(kept, np.exp((sampler.raw - sampler.raw[kept].max()) / 4), 0)
    tokens = np.concatenate(
        [sampler.draw(np.arange(a, a + 40), mask=mask, temperature=4.0)[0] for a in range(0, 2000, 40)]
    )
    assert_distribution(tokens, p / p.sum())


def test_log_probabilities_are_of_the_raw_logits(sampler: Sampler) -> None:
    log_p = sampler.raw - sampler.raw.max() - np.log(np.exp(sampler.raw - sampler.raw.max()).sum())
    bias = {"bias_ids": i32(4), "bias_values": np.array([100.0], np.float32), "temperature": 0.3}
    token, logprob, ids, top = sampler.draw(np.arange(3), top=5, **bias)
    assert set(token) == {4}
    np.testing.assert_allclose(logprob, log_p[4], atol=1e-4)
    assert np.array_equal(ids[0, :5], np.argsort(-sampler.raw, kind="stable")[:5])
    np.testing.assert_allclose(top[0, :5], np.sort(log_p)[::-1][:5], atol=1e-4)
    token, logprob, _, _ = sampler.draw(np.arange(2), target=17, top=0)
    assert set(token) == {17}
    np.testing.assert_allclose(logprob, log_p[17], atol=1e-4)


def test_a_draw_depends_on_seed_choice_and_position_only(sampler: Sampler) -> None:
    base = sampler.draw(np.arange(40), temperature=3.0)[0]
    for position in (0, 13, 39):
        assert sampler.draw(np.array([position]), temperature=3.0)[0][0] == base[position]
    assert not np.array_equal(sampler.draw(np.arange(40), temperature=3.0, choice=1)[0], base)
    assert not np.array_equal(sampler.draw(np.arange(40), temperature=3.0, seed=8)[0], base)


def test_uniform_numbers_are_uniform_and_distinct() -> None:
    values = np.array([_sterna.uniform(s, c, p) for s in range(10) for c in range(4) for p in range(100)])
    assert len(set(values)) == len(values)
    assert 0 <= values.min() < 0.002
    assert 0.998 < values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / np.sqrt(12 * len(values))
