"""The header reader against its twin, the `gguf` package, and against damaged files."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import ModelFileError
from quant.formats import BLOCK, GGMLType
from quant.gguf_reader import GGUFHeader, read_header
from quant.mapping import MappedFile
from quant.model_file import open_model
from tests.tiny_models import write_tiny_gguf

PATH = Path("model.gguf")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def text_value(text: str) -> bytes:
    return struct.pack("<I", 8) + string(text)


def tensor_entry(name: str, dimensions: list[int], type_: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return string(name) + sizes + struct.pack("<IQ", type_, offset)


def file_bytes(
    keys: list[tuple[str, bytes]] = (),
    tensors: list[bytes] = (),
    *,
    version: int = 3,
    data: bytes = b"",
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A GGUF file by hand; counts can lie."""
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(string(key) + value for key, value in keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def assert_equal_to_twin(path: Path, header: GGUFHeader, mapping: MappedFile) -> None:
    twin = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in twin.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == fields
    assert list(header.metadata) == list(fields)
    assert list(header.tensors) == [tensor.name for tensor in twin.tensors]
    for tensor in twin.tensors:
        info = header.tensors[tensor.name]
        assert int(info.type) == int(tensor.tensor_type)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.offset == tensor.data_offset
        ours = np.frombuffer(mapping.data, np.uint8, info.num_bytes, info.offset)
        assert np.array_equal(ours, tensor.data.reshape(-1).view(np.uint8)), tensor.name


@pytest.mark.parametrize("type_", list(GGMLType))
def test_equals_the_gguf_package_for_every_type(tmp_path: Path, type_: GGMLType) -> None:
    metadata = {
        "x.list": [1, 2, 3],
        "x.floats": [0.5, -1.5],
        "x.words": ["a", "", "ü"],
        "x.flag": True,
        "x.flags": [True],
    }
    path = write_tiny_gguf(tmp_path / "m.gguf", linear_type=type_, hidden=256, ffn=256, metadata=metadata)
    mapping = MappedFile(path)
    assert_equal_to_twin(path, read_header(mapping.data, path), mapping)


def test_every_scalar_type_equals_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float64("f64", 0.1)
    writer.add_float32("f32", 0.1)
    writer.add_bool("no", False)
    writer.add_tensor("t", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mapping = MappedFile(path)
    header = read_header(mapping.data, path)
    assert_equal_to_twin(path, header, mapping)
    assert header.metadata["f64"] == 0.1
    assert header.metadata["f32"] == float(np.float32(0.1))


@pytest.mark.real_model
def test_default_model_equals_the_gguf_package(default_model: Path) -> None:
    path = default_model
    mapping = MappedFile(path)
    assert_equal_to_twin(path, read_header(mapping.data, path), mapping)


def test_block_sizes_are_ggmls() -> None:
    for type_, block in BLOCK.items():
        number = gguf.GGMLQuantizationType(int(type_))
        assert number.name == type_.name
        assert block == gguf.GGML_QUANT_SIZES[number]


def test_version_2_is_read() -> None:
    data = file_bytes([("general.name", text_value("x"))], version=2)
    assert read_header(data, PATH) == GGUFHeader(2, {"general.name": "x"}, {}, {"general.name": (44, 57)})


def test_alignment_of_the_file_holds() -> None:
    alignment = ("general.alignment", struct.pack("<II", 4, 64))
    data = file_bytes([alignment], [tensor_entry("t", [1], 0, 64)], data=bytes(160))
    assert read_header(data, PATH).tensors["t"].offset % 64 == 0


F32 = [tensor_entry("t", [8], 0, 0)]
ARRAY = struct.pack("<I", 9)
BAD_FILES = {
    "not GGUF": (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
    "empty": (b"", "truncated"),
    "half a header": (file_bytes()[:11], "truncated"),
    "version 1": (file_bytes(version=1), "version 1 is not supported"),
    "version 4": (file_bytes(version=4), "version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "too many tensors": (file_bytes(tensor_count=2**64 - 1), "18446744073709551615 tensors do not fit"),
    "too many keys": (file_bytes(key_count=2**63), "metadata keys do not fit"),
    "key count off by one": (
        file_bytes([("a", text_value("b"))], key_count=2, data=bytes(64)),
        "metadata key 1: an empty name",
    ),
    "long key": (file_bytes([("k" * 70000, text_value("v"))]), "a name of 70000 bytes"),
    "huge string": (file_bytes([("a", struct.pack("<IQ", 8, 2**64 - 1))]), "a: truncated"),
    "unknown value type": (file_bytes([("a", struct.pack("<I", 13))]), "a: unknown metadata value type 13"),
    "unknown array type": (file_bytes([("a", ARRAY + struct.pack("<IQ", 77, 1))]), "a: unknown metadata value type 77"),
    "nested array": (file_bytes([("a", ARRAY + struct.pack("<IQ", 9, 1))]), "an array of arrays"),
    "huge array": (file_bytes([("a", ARRAY + struct.pack("<IQ", 4, 2**62))]), "a: truncated"),
    "huge string array": (file_bytes([("a", ARRAY + struct.pack("<IQ", 8, 2**60))]), "strings do not fit"),
    "string array ends": (
        file_bytes([("a", ARRAY + struct.pack("<IQ", 8, 2) + string("x") + struct.pack("<Q", 999))]),
        "a: truncated: string 1 of 2",
    ),
    "string array begins at the end": (
        file_bytes([("a", ARRAY + struct.pack("<IQ", 8, 3) + string("x" * 20))])[:-8],
        "a: truncated: string 2 of 3 begins",
    ),
    "key not UTF-8": (file_bytes()[:16] + struct.pack("<QQ", 1, 2) + b"\xff\xfe" + bytes(30), "not UTF-8"),
    "token not UTF-8": (
        file_bytes([("a", ARRAY + struct.pack("<IQQ", 8, 1, 2) + b"\xc3\x28")]),
        "a: string 0 of 1 is not UTF-8",
    ),
    "bad truth value": (file_bytes([("a", struct.pack("<IB", 7, 2))]), "a: a truth value"),
    "duplicate key": (file_bytes([("a", text_value("1")), ("a", text_value("2"))]), "a: the metadata key occurs twice"),
    "alignment 3": (file_bytes([("general.alignment", struct.pack("<II", 4, 3))]), "general.alignment: 3 is not"),
    "alignment 0": (file_bytes([("general.alignment", struct.pack("<II", 4, 0))]), "general.alignment: 0 is not"),
    "alignment text": (file_bytes([("general.alignment", text_value("32"))]), "general.alignment: '32' is not"),
    "duplicate tensor": (file_bytes(tensors=F32 * 2, data=bytes(64)), "t: the tensor occurs twice"),
    "no dimensions": (file_bytes(tensors=[tensor_entry("t", [], 0, 0)], data=bytes(64)), "t: 0 dimensions"),
    "five dimensions": (file_bytes(tensors=[tensor_entry("t", [1] * 5, 0, 0)], data=bytes(64)), "t: 5 dimensions"),
    "zero dimension": (file_bytes(tensors=[tensor_entry("t", [4, 0], 0, 0)], data=bytes(64)), "t: a dimension is 0"),
    "overflowing dimensions": (
        file_bytes(tensors=[tensor_entry("t", [2**62, 2**62, 16], 0, 0)], data=bytes(64)),
        "t: truncated",
    ),
    "unsupported type": (file_bytes(tensors=[tensor_entry("t", [256], 10, 0)], data=bytes(99)), "t: tensor type Q2_K"),
    "removed type": (file_bytes(tensors=[tensor_entry("t", [256], 4, 0)], data=bytes(999)), "t: tensor type 4 is not"),
    "part of a block": (file_bytes(tensors=[tensor_entry("t", [33], 8, 0)], data=bytes(99)), "t: rows of 33 values"),
    "misaligned": (file_bytes(tensors=[tensor_entry("t", [8], 0, 4)], data=bytes(99)), "t: its offset 4 is not"),
    "out of the file": (
        file_bytes(tensors=[tensor_entry("t", [8], 0, 32)], data=bytes(63)),
        "t: truncated: its 32 bytes",
    ),
    "offset overflow": (file_bytes(tensors=[tensor_entry("t", [8], 0, 2**64 - 32)], data=bytes(64)), "t: truncated"),
    "overlap": (
        file_bytes(tensors=[tensor_entry("t", [16], 0, 0), tensor_entry("u", [8], 0, 32)], data=bytes(64)),
        "u: its bytes at 128 overlap 't'",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_name(case: str) -> None:
    data, message = BAD_FILES[case]
    with pytest.raises(ModelFileError, match=message) as failure:
        read_header(data, PATH)
    assert str(failure.value).startswith("model.gguf: ")
    assert "\n" not in str(failure.value)


def test_control_characters_of_a_name_do_not_reach_the_message() -> None:
    data = file_bytes(tensors=[tensor_entry("a\nb\x1b[31m", [8], 99, 0)], data=bytes(64))
    with pytest.raises(ModelFileError) as failure:
        read_header(data, PATH)
    assert str(failure.value).isprintable()


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    sizes = {"hidden": 32, "ffn": 32, "layers": 1, "heads": 2, "kv_heads": 1, "vocab_size": 270}
    return write_tiny_gguf(path, linear_type=GGMLType.Q8_0, **sizes).read_bytes()


def test_every_truncation_is_refused(tiny_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    # Every length near a structure's edge would take minutes; a prime stride hits all kinds of places.
    for length in [*range(0, len(tiny_bytes), 97), len(tiny_bytes) - 1]:
        path.write_bytes(tiny_bytes[:length])
        with pytest.raises(ModelFileError, match=r"m\.gguf: "):
            open_model(path)


FLIPS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(flips=FLIPS, in_header=st.booleans())
def test_a_damaged_file_opens_or_is_refused(
    tiny_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[float, bytes]], in_header: bool
) -> None:
    damaged = bytearray(tiny_bytes)
    span = 1200 if in_header else len(damaged) - 8  # keys and their small values are the first 1,200 bytes
    for place, replacement in flips:
        start = int(place * span)
        damaged[start : start + len(replacement)] = replacement
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(damaged)
    try:
        model = open_model(path)
    except ModelFileError as error:
        failure = error
    else:
        failure = None
    if failure is not None:
        assert str(failure).startswith(str(path))
        return
    for tensor in model.tensors.values():
        elements, size = BLOCK[tensor.type]
        assert tensor.read().nbytes == int(np.prod(tensor.shape)) // elements * size
    model.close()
