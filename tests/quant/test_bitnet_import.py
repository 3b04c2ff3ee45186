"""I2_S tensors and transformers' packed ternary weights, packed here by their own rules and served as TQ2_0 or Q8_0."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.bitnet_import import i2_s_bytes, i2_s_rows, pack_rows, served_type, uint8_rows
from quant.errors import ModelFileError
from quant.formats import I2_S, GGMLType
from quant.gguf_metadata import copied_metadata
from quant.gguf_reader import read_header
from quant.gguf_writer import TensorSource, write_gguf
from quant.mapping import MappedFile
from quant.model_file import open_model
from quant.quantize import dequantize
from tests.quant.packed_checkpoints import pack_i2_s, pack_uint8
from tests.tiny_models import write_tiny_gguf


def codes_of(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows * columns).integers(-1, 2, (rows, columns)).astype(np.int8)


@pytest.mark.parametrize(("columns", "type_"), [(512, GGMLType.TQ2_0), (96, GGMLType.Q8_0)])
@pytest.mark.parametrize("scale", [0.0371, 1.25, 0.0])
def test_codes_are_exact_and_the_scale_is_rounded_to_f16(columns: int, type_: GGMLType, scale: float) -> None:
    codes = codes_of(8, columns)
    assert served_type(columns) is type_
    expected = codes * np.float32(np.float16(scale))
    for data in (
        pack_rows(codes, scale),
        i2_s_rows(pack_i2_s(codes, scale), 8, columns),
        uint8_rows(pack_uint8(codes), scale),
    ):
        assert np.array_equal(dequantize(data, type_).reshape(codes.shape), expected)


def test_packing_is_transformers() -> None:
    torch = pytest.importorskip("torch")
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes = codes_of(12, 64)
    packed = bitnet.pack_weights(torch.from_numpy(codes.copy()))
    assert np.array_equal(pack_uint8(codes), packed.numpy())


@pytest.mark.parametrize(
    ("scale", "reason"), [(np.nan, "scale nan"), (np.inf, "scale inf"), (-1.0, "scale -1.0"), (1e6, "too large"),
                          (1e-9, "too small for f16")]
)  # fmt: skip
def test_scales_that_are_refused(scale: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack_rows(codes_of(2, 256), scale)


def test_odd_shapes_and_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="ternary rows of 100 values"):
        served_type(100)
    with pytest.raises(ValueError, match="no whole number of I2_S's blocks of 128"):
        i2_s_bytes(96)
    data = pack_i2_s(codes_of(2, 256), 1.0)
    data[5] |= 3
    with pytest.raises(ValueError, match="none of -1, 0 and 1"):
        i2_s_rows(data, 2, 256)


def write_i2_s(path: Path, source: Path, name: str, codes: np.ndarray, scale: float, cut: int = 0) -> Path:
    """The model of `source` with one tensor as I2_S. Our writer knows no such type, so its number is put in after."""
    file, mapping = open_model(source), MappedFile(source)
    data = pack_i2_s(codes, scale)
    data = data[: len(data) - cut]

    def tensor(name_: str) -> TensorSource:
        if name_ == name:  # as bytes of F32, of which there is one for each four
            return TensorSource(name, GGMLType.F32, (len(data) // 4,), lambda: [data])
        found = file.tensors[name_]
        return TensorSource(name_, found.type, found.shape, lambda: [found.read()])

    names = [*(n for n in file.tensors if n != name), name]
    write_gguf(path, copied_metadata(read_header(mapping.data, source), mapping.data), [tensor(n) for n in names])
    content = path.read_bytes()
    text = name.encode()
    old = text + b"".join(n.to_bytes(size, "little") for n, size in ((1, 4), (len(data) // 4, 8), (0, 4)))
    new = text + b"".join(
        n.to_bytes(size, "little") for n, size in ((2, 4), (codes.shape[1], 8), (codes.shape[0], 8), (I2_S, 4))
    )
    assert content.count(old) == 1
    head_end = content.index(old) + len(old) + 8
    head = content[:head_end].replace(old, new)
    body = content[-(-head_end // 32) * 32 :]
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


SHAPE: dict[str, Any] = {"hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 2}


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.1.attn_q.weight"])
def test_a_file_with_i2_s_is_served(tmp_path: Path, name: str) -> None:
    source = write_tiny_gguf(tmp_path / "s.gguf", **SHAPE)
    shape = open_model(source).tensors[name].shape
    codes = codes_of(*shape)
    tensor = open_model(write_i2_s(tmp_path / "m.gguf", source, name, codes, 0.5)).tensors[name]
    assert tensor.shape == shape
    assert tensor.type is served_type(shape[1])
    assert tensor.rope_interleaved is ("attn_q" in name)
    assert np.array_equal(dequantize(tensor.read(), tensor.type).reshape(shape), codes * np.float32(0.5))
    tensor.release()


def test_a_truncated_or_broken_i2_s_tensor_is_named(tmp_path: Path) -> None:
    source, name = write_tiny_gguf(tmp_path / "s.gguf", **SHAPE), "blk.1.ffn_down.weight"
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down\.weight: truncated"):
        open_model(write_i2_s(tmp_path / "cut.gguf", source, name, codes_of(128, 256), 0.5, cut=64))
    broken = open_model(write_i2_s(tmp_path / "nan.gguf", source, name, codes_of(128, 256), np.nan))
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down\.weight: its scale nan"):
        broken.tensors[name].read()
