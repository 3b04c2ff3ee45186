"""Perplexity from the core's own scores against the float32 twin's, whatever the windows."""

from pathlib import Path

import numpy as np
import pytest

from quant.model_file import open_model
from server.engine.perplexity import perplexity, window_logprobs
from server.engine.weights import load_core
from tests.server.engine.reference import Reference, score
from tests.tiny_models import write_tiny_gguf


def test_windows_and_bos(tmp_path: Path) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "m.gguf"))
    core = load_core(file, isa="auto", num_threads=1, num_blocks=8, max_num_seqs=1, max_batch_tokens=64)
    ids = np.random.default_rng(0).integers(0, 384, 200).astype(np.int32)
    reference = Reference(file)
    scores = score(ids[:128], reference.logits(ids[:128]))
    assert np.allclose(window_logprobs(core, ids[:128]), scores.logprobs, atol=0.02)

    parts = [ids[:100], ids[100:]]
    expected = np.concatenate([score(part, reference.logits(part)).logprobs for part in parts])
    heard: list[tuple[int, int]] = []
    found = perplexity(core, ids.tolist(), window_tokens=100, progress=lambda done, total: heard.append((done, total)))
    assert found.num_scored == 198
    assert found.value == pytest.approx(np.exp(-expected.mean()), rel=0.005)
    assert heard == [(100, 200), (200, 200)]

    parts = [np.array([1, *ids[:99]]), np.array([1, *ids[99:198]]), np.array([1, *ids[198:]])]
    expected = np.concatenate([score(part, reference.logits(part)).logprobs for part in parts])
    found = perplexity(core, ids.tolist(), prefix_ids=[1], window_tokens=100)
    assert found.num_scored == 200
    assert found.value == pytest.approx(np.exp(-expected.mean()), rel=0.005)


def test_a_text_with_nothing_to_predict(tmp_path: Path) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "m.gguf"))
    core = load_core(file, isa="auto", num_threads=1, num_blocks=8, max_num_seqs=1, max_batch_tokens=64)
    for ids in ([], [5]):
        with pytest.raises(ValueError, match="leave nothing to predict"):
            perplexity(core, ids)
