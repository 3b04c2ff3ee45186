"""The models that speed is measured on: the default one, and ternary ones of two sizes with random weights.

`nano` has the shape of nanochat-rs-ternary's 125M model, `2b` that of BitNet b1.58 2B4T. Both are llama-architecture
GGUF files with TQ2_0 matrices, a Q8_0 embedding that is the head too, and the default model's tokenizer, so that any
GGUF runtime loads them. Speed does not depend on the weights' values. They are made in the cache when first asked for.
Measures nothing itself.

usage: python -m benchmarks.models {nano,2b} [--cache DIR]
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.serve_process import model_path
from quant.formats import BLOCK, GGMLType
from quant.gguf_metadata import config_metadata, copied_metadata
from quant.gguf_reader import read_header
from quant.gguf_writer import TensorSource, write_gguf
from quant.mapping import MappedFile
from quant.model_file import open_model
from quant.model_types import ModelConfig
from quant.quantize import quantize

CACHE = Path.home() / ".cache" / "sterna" / "bench-models"
DEFAULT = "smollm2-135m-instruct"
_CONTEXT = 8192
"""Room for 4,096 tokens and some more."""
_SLICE_ROWS = 4096


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int


SHAPES = {"nano": Shape(768, 12, 2048, 12, 12), "2b": Shape(2560, 30, 6912, 20, 5)}


@dataclass(frozen=True)
class Work:
    """What a step must do at least."""

    layer_macs: int
    """Multiply-adds of a token in the layers' matrices; attention not counted."""
    head_macs: int
    """Of a token whose logits are computed."""
    layer_bytes: int
    head_bytes: int


def path_of(name: str, cache: Path = CACHE) -> Path:
    """The file of a model: one of SHAPES, a name of the catalogue, or a path."""
    if name not in SHAPES:
        return Path(model_path(name))
    path = cache / f"{name}-random-tq2_0.gguf"
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        cache.mkdir(parents=True, exist_ok=True)
        make_ternary(path, SHAPES[name], Path(model_path(DEFAULT)))
    return path


def work_of(path: Path) -> Work:
    with_head = {"token_embd.weight", "output.weight"}
    file = open_model(path)
    matrices = [t for t in file.tensors.values() if len(t.shape) == 2 and t.name not in with_head]
    head = file.tensors.get("output.weight") or file.tensors["token_embd.weight"]
    work = Work(
        sum(math.prod(t.shape) for t in matrices),
        math.prod(head.shape),
        sum(_num_bytes(t.type, t.shape) for t in matrices),
        _num_bytes(head.type, head.shape),
    )
    file.close()
    return work


def _num_bytes(type_: GGMLType, shape: tuple[int, ...]) -> int:
    elements, size = BLOCK[type_]
    return math.prod(shape) // elements * size


def make_ternary(path: Path, shape: Shape, tokenizer: Path) -> None:
    """Write a model of `shape` with random weights and the tokenizer of another GGUF file."""
    source = MappedFile(tokenizer)
    header = read_header(source.data, tokenizer)
    copied = {k: v for k, v in copied_metadata(header, source.data).items() if k.startswith("tokenizer.")}
    vocab = len(header.metadata["tokenizer.ggml.tokens"])
    head_dim = shape.hidden // shape.heads
    config = ModelConfig(
        "llama", path.stem, shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, head_dim, vocab,
        _CONTEXT, 1e-5, 100_000.0, head_dim, None, False, False, True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = [
        TensorSource("token_embd.weight", GGMLType.Q8_0, (vocab, shape.hidden), lambda: _embedding(rng, vocab, shape)),
        _norm("output_norm.weight", shape.hidden),
    ]
    names = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"} | {
        "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"
    }  # fmt: skip
    for layer in range(shape.layers):
        tensors += [_norm(f"blk.{layer}.{kind}_norm.weight", shape.hidden) for kind in ("attn", "ffn")]
        for name, projection in names.items():
            rows, cols = config.projection_shape(f"{projection}_proj")
            pieces = _ternary(rng, rows * cols // 256, 1.2 / math.sqrt(cols))
            tensors.append(TensorSource(f"blk.{layer}.{name}.weight", GGMLType.TQ2_0, (rows, cols), pieces))
    write_gguf(path, {**config_metadata(config, GGMLType.TQ2_0), **copied}, tensors)
    source.close()


def _embedding(rng: np.random.Generator, vocab: int, shape: Shape) -> Iterator[np.ndarray]:
    for start in range(0, vocab, _SLICE_ROWS):
        rows = min(_SLICE_ROWS, vocab - start)
        values = rng.standard_normal((rows, shape.hidden), np.float32) * np.float32(0.5)
        yield quantize(values.view(np.uint8).reshape(-1), GGMLType.F32, GGMLType.Q8_0)


def _norm(name: str, size: int) -> TensorSource:
    return TensorSource(name, GGMLType.F32, (size,), lambda: (np.ones(size, np.float32).tobytes(),))


def _ternary(rng: np.random.Generator, blocks: int, scale: float) -> Callable[[], Iterator[np.ndarray]]:
    """Blocks of 64 bytes of four codes and an f16 scale; half of the codes are 1, which is the weight 0."""

    def pieces() -> Iterator[np.ndarray]:
        data = rng.integers(0, 256, (blocks, 66), np.uint8)
        low, high = data & 0x55, (data >> 1) & 0x55
        data = low | ((high & ~low) << 1)  # the code 3 does not occur
        data[:, 64:] = np.array([scale], np.float16).view(np.uint8)
        yield data.reshape(-1)

    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    print(path_of(args.model, args.cache))


if __name__ == "__main__":
    main()
