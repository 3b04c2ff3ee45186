"""Frozen matrices unpack bit for bit to what the `gguf` package says, in every type that the server reads."""

import gguf
import numpy as np
import pytest
import torch

from finetune.model.frozen import Scratch, freeze, read_rows
from quant.formats import BLOCK, GGMLType
from quant.model_types import Tensor
from tests.tiny_models import K_QUANTS, bfloat16_bits, dequantize, random_blocks

SHAPE = (24, 512)
CPU = torch.device("cpu")


class Bytes:
    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.data.flags.writeable = False

    def read(self) -> np.ndarray:
        return self.data

    def release(self) -> None:
        self.data = np.zeros(0, np.uint8)


def random_tensor(type_: GGMLType, shape: tuple[int, int] = SHAPE) -> Tensor:
    rng = np.random.default_rng(int(type_))
    values = rng.standard_normal(shape).astype(np.float32)
    if type_ is GGMLType.F32:
        raw = values
    elif type_ is GGMLType.F16:
        raw = values.astype(np.float16)
    elif type_ is GGMLType.BF16:
        raw = bfloat16_bits(values)
    elif type_ in K_QUANTS:
        raw = random_blocks(type_, shape, rng)
    else:
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(type_)))
    data = np.frombuffer(raw.tobytes(), np.uint8).copy()
    return Tensor("matrix", type_, shape, rope_interleaved=False, data=Bytes(data))


@pytest.mark.parametrize("rows", [None, np.random.default_rng(0).permutation(SHAPE[0])], ids=["plain", "permuted"])
@pytest.mark.parametrize("type_", list(BLOCK))
def test_equals_gguf(type_: GGMLType, rows: np.ndarray | None) -> None:
    tensor = random_tensor(type_)
    expected = dequantize(tensor.read().copy(), type_, SHAPE)
    out = torch.full(SHAPE, torch.nan)
    matrix = freeze(tensor, rows, Scratch(CPU), CPU)
    matrix.unpack(out)
    np.testing.assert_array_equal(out.numpy(), expected if rows is None else expected[rows])
    elements, size = BLOCK[type_]
    in_file = SHAPE[0] * SHAPE[1] // elements * size
    # K-quants keep their 6-bit scales in bytes; TQ1_0 is kept in two bits a weight.
    assert matrix.num_bytes <= in_file * (1.3 if type_ is GGMLType.TQ1_0 else 1.03)


def test_unpacks_into_a_part_of_a_buffer_in_its_type() -> None:
    first, second = random_tensor(GGMLType.Q4_1), random_tensor(GGMLType.Q8_0, (8, 512))
    buffer = torch.full((40, 512), torch.nan, dtype=torch.bfloat16)
    scratch = Scratch(CPU)
    freeze(first, None, scratch, CPU).unpack(buffer[:24])
    second_expected = torch.from_numpy(dequantize(second.read().copy(), second.type, second.shape)).bfloat16()
    freeze(second, None, scratch, CPU).unpack(buffer[24:32])
    assert torch.equal(buffer[24:32], second_expected)
    assert not buffer[:32].isnan().any()
    assert buffer[32:].isnan().all()


@pytest.mark.parametrize("type_", list(BLOCK))
def test_single_rows(type_: GGMLType) -> None:
    tensor = random_tensor(type_)
    ids = np.array([3, 0, 3, 23])
    np.testing.assert_array_equal(read_rows(tensor, ids), dequantize(tensor.read().copy(), type_, SHAPE)[ids])
