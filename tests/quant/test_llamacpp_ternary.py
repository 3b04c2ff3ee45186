"""Ternary files that we write, in llama.cpp; and one that gguf-py's quantizer wrote, here: the same model in both.

The model is made, not trained, so that the comparison says something: with plain random weights the two likeliest of
many tokens are so close that any rounding swaps them. Here the head looks for the token that follows the present one in
a fixed order, and the layers' outputs are as large as the embedding and overrule it in some percent of the positions.
With the rows of Q and K in the wrong order the comparison fails by far. Teacher-forced over 12,000 positions of what
such a model would say: four tokens of five in the order, the others any.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quant.export import export_gguf
from quant.export_types import choose_types
from quant.formats import GGMLType
from quant.gguf_metadata import config_metadata
from quant.gguf_writer import TensorSource, write_gguf
from quant.model_file import ModelFile, open_model
from quant.rope_order import file_rows
from quant.tensor_rules import is_query_or_key
from server.text.gguf_export import PROBES, gguf_tokenizer_metadata
from server.text.tokenizer import build_tokenizer
from tests.quant.peer_logits import Comparison, compare_logits, llamacpp_logits, our_logits
from tests.server.text.peer import llamacpp_tokens
from tests.tiny_models import interleave_rows, tiny_weights, write_tiny_gguf, write_tiny_hf
from tests.tiny_weights import TinyShape

pytestmark = [pytest.mark.real_peer, pytest.mark.slow]
SHAPE: dict[str, Any] = {"hidden": 256, "ffn": 768, "heads": 4, "kv_heads": 2, "layers": 3, "tie": False,
                         "context_length": 4096}  # fmt: skip
PREVIOUS = np.random.default_rng(8).permutation(384)
"""For each token the one that it follows."""
HEAD_SCALE = np.float32(0.04)
SCALES = {  # queries so large that attention picks a few positions: else it is a mean of all, and hardly seen
    "attn_q.weight": np.float32(2),
    "attn_output.weight": np.float32(1.6),
    "ffn_down.weight": np.float32(1.8),
}


def weights() -> dict[str, np.ndarray]:
    """By GGUF name, Q and K rows in Hugging Face order."""
    found = tiny_weights(TinyShape(**SHAPE))
    embedding = np.random.default_rng(7).standard_normal(found["token_embd.weight"].shape).astype(np.float32)
    found["token_embd.weight"] = embedding
    found["output.weight"] = HEAD_SCALE * embedding[PREVIOUS]
    for name in found:
        kind = name.split(".", 2)[-1]
        found[name] = SCALES.get(kind, np.float32(1)) * found[name]
    return found


def compare(path: Path, other: Path | None = None) -> Comparison:
    """`path` here and `other` (the same file) in llama.cpp."""
    texts = [text(seed) for seed in range(6)]
    return compare_logits(
        our_logits(path, texts), llamacpp_logits(other or path, texts, path.with_suffix(".npz")), texts
    )


def text(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    following = np.argsort(PREVIOUS)
    ids = rng.integers(0, 384, 2000)
    for i in np.flatnonzero(rng.random(1999) < 0.8) + 1:
        ids[i] = following[ids[i - 1]]
    return ids.astype(np.int32)


def export(folder: Path, wanted: GGMLType) -> Path:
    source = open_model(write_tiny_hf(folder / "hf", replace=weights(), **SHAPE))
    tensors = {name: (t.type, t.shape) for name, t in source.tensors.items()}
    metadata = config_metadata(source.config, wanted) | gguf_tokenizer_metadata(source.tokenizer, 384)
    export_gguf(source, folder / "m.gguf", choose_types(source.path, tensors, wanted), metadata)
    return folder / "m.gguf"


def check(found: Comparison) -> None:
    assert found.positions >= 10_000
    assert found.top1 >= 0.99
    assert found.widest_gap < 0.1
    ours, theirs = found.perplexities
    assert ours == pytest.approx(theirs, rel=0.005)


@pytest.mark.parametrize("wanted", [GGMLType.TQ1_0, GGMLType.TQ2_0])
def test_our_export_in_llamacpp(tmp_path: Path, wanted: GGMLType) -> None:
    path = export(tmp_path, wanted)
    file = open_model(path)
    assert file.tensors["blk.0.attn_q.weight"].type is wanted
    check(compare(path))
    tokenizer = build_tokenizer(file.tokenizer, 384)
    ours = [tokenizer.encode(sample, add_special=True, parse_special=True) for sample in PROBES]
    assert llamacpp_tokens(path, PROBES)["ids"] == ours


def test_rows_in_the_wrong_order_would_be_found(tmp_path: Path) -> None:
    path = export(tmp_path, GGMLType.TQ2_0)
    wrong = tmp_path / "wrong.gguf"
    reordered(open_model(path), wrong)
    found = compare(path, wrong)
    assert found.top1 < 0.99
    assert found.widest_gap > 1


def reordered(file: ModelFile, path: Path) -> None:
    """The model with Q and K permuted once more, as if its source's rows had been in the file's order."""

    def tensor(name: str) -> TensorSource:
        found, order = file.tensors[name], file_rows(file.config, name)
        rows = found.read().reshape(found.shape[0], -1)
        data = np.ascontiguousarray(rows if order is None else rows[order])
        return TensorSource(name, found.type, found.shape, lambda: [data])

    metadata = {f"tokenizer.{key}": value for key, value in file.tokenizer.metadata.items()}
    config = replace(file.config, name="wrong")
    write_gguf(path, config_metadata(config, GGMLType.TQ2_0) | metadata, [tensor(name) for name in file.tensors])


@pytest.mark.parametrize("wanted", [GGMLType.TQ1_0, GGMLType.TQ2_0])
def test_a_file_of_gguf_pys_quantizer_here(tmp_path: Path, wanted: GGMLType) -> None:
    path = write_tiny_gguf(
        tmp_path / "m.gguf", linear_type=wanted, embedding_type=GGMLType.Q8_0, replace=in_file_order(), **SHAPE
    )
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == "llama"
    check(compare(path))


def in_file_order() -> dict[str, np.ndarray | None]:
    """The weights as they belong into a GGUF file."""
    head_dim = SHAPE["hidden"] // SHAPE["heads"]
    return {
        name: interleave_rows(array, head_dim) if is_query_or_key(name) else array for name, array in weights().items()
    }
