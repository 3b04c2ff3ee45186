"""The safetensors header reader against its twin, the `safetensors` package, and against damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quant.errors import ModelFileError
from quant.mapping import MappedFile
from quant.quantize import to_float32
from quant.safetensors_reader import read_tensors
from tests.tiny_models import bfloat16_bits, save_safetensors


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"a": rng.standard_normal((3, 5)), "b": rng.standard_normal(7), "c": rng.standard_normal((2, 32))}


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> MappedFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return MappedFile(path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equals_the_safetensors_package(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, arrays(), dtype)
    ours = read_tensors(MappedFile(path))
    with safe_open(path, "numpy") as twin:
        assert set(twin.keys()) == set(ours)
        for name, tensor in ours.items():
            expected = twin.get_tensor(name)
            assert tensor.shape == expected.shape
            assert np.array_equal(tensor.data.read(), expected.reshape(-1).view(np.uint8))


def test_bfloat16_comes_from_the_raw_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(path, arrays(), "bfloat16")
    for name, tensor in read_tensors(MappedFile(path)).items():
        bits = bfloat16_bits(arrays()[name])
        assert np.array_equal(tensor.data.read().view(np.uint16), bits.reshape(-1))
        values = to_float32(tensor.data.read(), tensor.type).reshape(tensor.shape)
        assert np.allclose(values, arrays()[name], rtol=2**-8, atol=0)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{nonsense", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "deep JSON": (b"[" * 100_000, "not valid JSON"),
    "a list": ([1], "not a JSON object"),
    "twice": (b'{"t": {}, "t": {}}', "a name occurs twice"),
    "no entry": ({"t": 3}, "t: the header's entry has no valid data_offsets"),
    "offsets reversed": ({"t": entry(offsets=[8, 0])}, "t: the header's entry has no valid data_offsets"),
    "offsets negative": ({"t": entry(offsets=[-8, 0])}, "t: the header's entry has no valid data_offsets"),
    "offsets of text": ({"t": entry(offsets=["0", "8"])}, "t: the header's entry has no valid data_offsets"),
    "shape negative": ({"t": entry(shape=[-2])}, "t: the header's entry has no valid shape"),
    "shape of truths": ({"t": entry(shape=[True])}, "t: the header's entry has no valid shape"),
    "dtype": ({"t": entry("I64", [1])}, "t: dtype 'I64' is not supported"),
    "dtype list": ({"t": entry(["F32"])}, "t: dtype .* is not supported"),  # type: ignore[arg-type]
    "size": ({"t": entry(shape=[3])}, "t: 8 bytes for F32 of shape"),
    "overflow": ({"t": entry(shape=[2**62, 2**62])}, "t: 8 bytes for F32 of shape"),
    "out of the file": ({"t": entry(shape=[4], offsets=[0, 16])}, "t: truncated"),
    "gap": ({"t": entry(shape=[1], offsets=[4, 8])}, "t: its bytes begin at 4, expected 0"),
    "overlap": ({"t": entry(), "u": entry(shape=[1], offsets=[4, 8])}, "u: its bytes begin at 4, expected 8"),
    "bytes left": ({"t": entry(shape=[1], offsets=[0, 4])}, "the tensors end at"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    with pytest.raises(ModelFileError, match=message):
        read_tensors(write(tmp_path / "x.safetensors", header, bytes(8)))


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ModelFileError, match="a header of 18446744073709551615 bytes does not fit"):
        read_tensors(write(path, {}, length=2**64 - 1))
    path.write_bytes(b"1234")
    with pytest.raises(ModelFileError, match="truncated: 4 bytes"):
        read_tensors(MappedFile(path))
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match="the file is empty"):
        MappedFile(path)


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_safetensors(path, arrays(), "float16")
    damaged = bytearray(path.read_bytes())
    for start, replacement in flips:
        damaged[start : start + len(replacement)] = replacement
    path.write_bytes(damaged)
    tensors, failure = {}, None
    try:
        tensors = read_tensors(MappedFile(path))
    except ModelFileError as error:
        failure = error
    assert failure is None or str(failure).startswith(str(path))
    assert all(tensor.data.read().size == tensor.data.size for tensor in tensors.values())
