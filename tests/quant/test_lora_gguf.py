"""LoRA GGUF files, read back with the `gguf` package: names, shapes, row order, one alpha for all, and what is refused.

That llama.cpp makes of such a file what our engine makes of the adapter is in tests/finetune/model/test_four_ways.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quant.errors import ModelFileError
from quant.gguf_reader import read_header
from quant.lora_gguf import FOLDED_KEY, LoraPair, write_lora_gguf
from quant.model_file import ModelConfig, open_model
from quant.rope_order import half_split_rows, interleaved_rows
from quant.tensor_rules import expected_tensors, is_query_or_key
from tests.tiny_models import write_tiny_gguf

KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def config_of(folder: Path, **shape: Any) -> ModelConfig:
    file = open_model(write_tiny_gguf(folder / "base.gguf", **shape))
    file.close()
    return file.config


def pairs_for(config: ModelConfig, *, rank: int = 4, scale: float = 2.0) -> list[LoraPair]:
    """For every matrix of every layer."""
    rng = np.random.default_rng(5)

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return [
        LoraPair(name, values(rank, shape[1]), values(shape[0], rank), scale)
        for name, shape in expected_tensors(config)
        if name.startswith("blk.") and name.endswith(".weight") and len(shape) == 2
    ]


class Read:
    """A file as llama.cpp would take it."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.facts = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
        self.alpha = np.float32(self.facts["adapter.lora.alpha"])

    def update(self, tensor: str) -> np.ndarray:
        """What is added to the base tensor: llama.cpp's arithmetic of scales (llama-adapter.h, get_scale)."""
        a, b = self.tensors[f"{tensor}.lora_a"], self.tensors[f"{tensor}.lora_b"]
        scale = self.alpha / np.float32(b.shape[1]) if self.alpha else 1.0
        return scale * (b @ a)


def expected_update(pair: LoraPair) -> np.ndarray:
    return np.float32(pair.scale) * (pair.b @ pair.a)


def write(path: Path, config: ModelConfig, pairs: Sequence[LoraPair]) -> tuple[Read, tuple[str, ...]]:
    folded = write_lora_gguf(path, config, pairs, {"general.name": "tools@1"})
    return Read(path), folded


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "wide heads": {"head_dim": 32},
    "one KV head": {"heads": 6, "kv_heads": 1, "hidden": 96},
    "qwen2": {"architecture": "qwen2"},
    "qwen3": {"architecture": "qwen3"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_contents(shape: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(tmp_path, **shape)
    pairs = pairs_for(config)
    path = tmp_path / "lora.gguf"
    read, folded = write(path, config, pairs)
    assert folded == ()
    assert FOLDED_KEY not in read.facts
    known = {
        "general.type": "adapter",
        "general.architecture": config.architecture,
        "adapter.type": "lora",
        "general.name": "tools@1",
    }
    assert {name: read.facts[name] for name in known} == known
    assert read.alpha == 8.0
    assert set(read.tensors) == {
        f"blk.{layer}.{kind}.weight.lora_{half}" for layer in range(2) for kind in KINDS for half in "ab"
    }
    for pair in pairs:
        a, b = read.tensors[f"{pair.tensor}.lora_a"], read.tensors[f"{pair.tensor}.lora_b"]
        np.testing.assert_array_equal(a, pair.a)
        assert a.dtype == b.dtype == np.float32
        if config.architecture == "llama" and is_query_or_key(pair.tensor):
            assert not np.array_equal(b, pair.b)
            b = b[half_split_rows(config, len(b) // config.head_dim)]  # what the engine does to the base's rows
        np.testing.assert_array_equal(b, pair.b)
    assert read_header(path.read_bytes(), path).tensors.keys() == read.tensors.keys()
    assert {one.name for one in tmp_path.iterdir()} == {"base.gguf", "lora.gguf"}


def test_the_rows_are_those_of_the_base(tmp_path: Path) -> None:
    """A pair that adds the base's own Q to itself: the file of the base says in which order."""
    path = write_tiny_gguf(tmp_path / "base.gguf")
    file = open_model(path)
    tensor = file.tensors["blk.0.attn_q.weight"]
    stored = np.array(tensor.read()).view(np.float32).reshape(tensor.shape)
    half_split = stored[half_split_rows(file.config, file.config.num_heads)]
    pair = LoraPair(tensor.name, np.eye(64, dtype=np.float32), half_split, 1.0)
    read, _ = write(tmp_path / "lora.gguf", file.config, [pair])
    np.testing.assert_array_equal(read.update(tensor.name), stored)
    assert not np.array_equal(half_split, stored)
    file.close()


def test_the_two_orders_are_inverse(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    rows = np.arange(config.num_heads * config.head_dim)
    np.testing.assert_array_equal(
        half_split_rows(config, config.num_heads)[interleaved_rows(config, config.num_heads)], rows
    )


def test_rslora_of_one_rank_needs_no_folding(tmp_path: Path) -> None:
    config = config_of(tmp_path, architecture="qwen2")
    pairs = pairs_for(config, rank=8, scale=16 / np.sqrt(8))
    read, folded = write(tmp_path / "lora.gguf", config, pairs)
    assert folded == ()
    assert read.alpha == np.float32(16 * np.sqrt(8))
    for pair in pairs:
        np.testing.assert_allclose(read.update(pair.tensor), expected_update(pair), rtol=1e-5, atol=1e-5)


def test_other_scales_are_folded_into_b(tmp_path: Path) -> None:
    """As rank and alpha patterns make them; most pairs keep their values bit for bit."""
    config = config_of(tmp_path, architecture="qwen2")
    pairs = pairs_for(config, rank=4, scale=2.0)
    other = pairs_for(config, rank=6, scale=16 / np.sqrt(6))
    pairs[1], pairs[9] = other[1], other[9]
    pairs[2] = LoraPair(pairs[2].tensor, pairs[2].a, pairs[2].b, 0.0)
    read, folded = write(tmp_path / "lora.gguf", config, pairs)
    assert folded == (pairs[1].tensor, pairs[2].tensor, pairs[9].tensor)
    assert read.facts[FOLDED_KEY] == list(folded)
    assert read.alpha == 8.0
    for pair in pairs:
        np.testing.assert_allclose(read.update(pair.tensor), expected_update(pair), rtol=1e-5, atol=1e-4)
        if pair.tensor not in folded:
            np.testing.assert_array_equal(read.tensors[f"{pair.tensor}.lora_b"], pair.b)


@pytest.mark.parametrize("scale", [0.0, 1e-50])
def test_alpha_zero_would_mean_a_scale_of_one(scale: float, tmp_path: Path) -> None:
    config = config_of(tmp_path, architecture="qwen2")
    pairs = [LoraPair(one.tensor, one.a, one.b * np.float32(1e20), scale) for one in pairs_for(config)]
    read, folded = write(tmp_path / "lora.gguf", config, pairs)
    assert read.alpha == 1.0
    assert folded == tuple(pair.tensor for pair in pairs)
    for pair in pairs:
        assert np.abs(read.update(pair.tensor)).max() <= 1e-25


@pytest.mark.parametrize("factor", [1e30, 1e-36])
def test_what_float32_cannot_hold_is_refused(factor: float, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    pairs = pairs_for(config)
    one = pairs[3]
    pairs[3] = LoraPair(one.tensor, one.a, one.b * np.float32(factor), 2.0 * (1e9 if factor > 1 else 1e-9))
    with pytest.raises(ModelFileError, match=r"blk\.0\.attn_output\.weight\.lora_b: its scale 2e.* is too far from"):
        write(tmp_path / "lora.gguf", config, pairs)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf"}


def test_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ModelFileError, match=r"no/folder/lora\.gguf: No such file"):
        write(tmp_path / "no" / "folder" / "lora.gguf", config, pairs_for(config))
    (tmp_path / "there").write_bytes(b"mine")
    with pytest.raises(ModelFileError, match="there: it exists already"):
        write(tmp_path / "there", config, pairs_for(config))

    def full(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ModelFileError, match="No space left on device"):
        write(tmp_path / "lora.gguf", config, pairs_for(config))
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "there"}
    assert (tmp_path / "there").read_bytes() == b"mine"
