"""NF4 against what bitsandbytes itself wrote and read (tests/data/nf4_golden.safetensors), bit for bit, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant import nf4
from quant.formats import GGMLType
from quant.mapping import MappedFile
from quant.quantize import quantize, to_float32
from quant.safetensors_reader import SafeTensor, read_packed_tensors

GOLDEN = read_packed_tensors(MappedFile(Path(__file__).parents[1] / "data" / "nf4_golden.safetensors"))
CASES = ["double_bf16", "double_f16", "double_f32", "plain_f32", "odd"]


def raw(name: str) -> np.ndarray:
    return GOLDEN[name].data.read()


def values_of(case: str) -> tuple[nf4.NF4State, np.ndarray]:
    weight = f"{case}.weight"
    state = nf4.read_state(raw(f"{weight}.quant_state.bitsandbytes__nf4").tobytes())
    none = np.empty(0, np.float32)
    is_double = state.nested_block is not None
    scales = nf4.scales(
        state,
        raw(f"{weight}.absmax") if is_double else raw(f"{weight}.absmax").view(np.float32),
        raw(f"{weight}.nested_absmax").view(np.float32) if is_double else none,
        raw(f"{weight}.nested_quant_map").view(np.float32) if is_double else none,
    )
    return state, nf4.dequantize(state, raw(weight), scales)


@pytest.mark.parametrize("case", CASES)
def test_values_are_bitsandbytes_own(case: str) -> None:
    assert np.array_equal(raw(f"{case}.weight.quant_map").view(np.float32), nf4.CODE_BOOK)
    state, values = values_of(case)
    expected = GOLDEN[f"{case}.expected"]
    assert isinstance(expected, SafeTensor)
    assert (state.dtype, state.shape) == (expected.type, expected.shape)
    assert np.array_equal(quantize(values.view(np.uint8), GGMLType.F32, state.dtype), expected.data.read())


@pytest.mark.parametrize("case", CASES)
def test_values_quantize_to_the_codes_that_they_came_from(case: str) -> None:
    state, values = values_of(case)
    codes, _ = nf4.quantize(values, state.block)
    assert np.array_equal(codes, raw(f"{case}.weight"))


def test_quantizing_is_bitsandbytes_own() -> None:
    source = GOLDEN["plain_f32.source"]
    assert isinstance(source, SafeTensor)
    codes, absmax = nf4.quantize(to_float32(source.data.read(), source.type), 64)
    assert np.array_equal(codes, raw("plain_f32.weight"))
    assert np.array_equal(absmax, raw("plain_f32.weight.absmax").view(np.float32))


@settings(max_examples=50)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-1000, 1000, width=32)),
    block=st.sampled_from([32, 64, 128]),
)
def test_a_round_trip_gives_the_nearest_codes(values: np.ndarray, block: int) -> None:
    values = np.where(np.abs(values) < 1e-30, np.float32(0), values)
    codes, absmax = nf4.quantize(values, block)
    state = nf4.NF4State(GGMLType.F32, values.shape, block, None, 0.0)
    back = nf4.dequantize(state, codes, absmax)
    scale = np.repeat(absmax, block)[: values.size]
    gap = np.float32(0.152)  # half the widest gap of the code book, between -1 and -0.696
    assert (np.abs(back - values) <= gap * scale).all()
    again, absmax_again = nf4.quantize(back, block)
    assert np.array_equal(again, codes)
    assert np.array_equal(absmax_again, absmax)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        nf4.quantize(np.array([1, np.nan], np.float32), 64)
    state = nf4.NF4State(GGMLType.F32, (2,), 64, None, 0.0)
    with pytest.raises(ValueError, match="a scale is not finite"):
        nf4.scales(state, np.array([np.inf], np.float32), np.empty(0), np.empty(0))


GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4' is not supported"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"shape": []}, "is not a list of sizes"),
        ({"shape": [2, 2.5]}, "is not a list of sizes"),
        ({"blocksize": 0}, "blocksize 0"),
        ({"blocksize": None}, "blocksize None"),
        ({"nested_blocksize": "x"}, "nested_blocksize 'x'"),
        ({"nested_offset": float("nan")}, "nested_offset nan"),
    ],
)
def test_states_that_are_refused(change: dict[str, object], reason: str) -> None:
    assert nf4.read_state(json.dumps(GOOD).encode()).num_blocks == 2
    with pytest.raises(ValueError, match=reason):
        nf4.read_state(json.dumps(GOOD | change).encode())
    for text in (b"{", b"[]", b"\xff"):
        with pytest.raises(ValueError, match="quant_state is not"):
            nf4.read_state(text)
