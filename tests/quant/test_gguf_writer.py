"""Files that we write, read by the `gguf` package and by ourselves; nothing half-written when writing fails."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.errors import ModelFileError
from quant.formats import GGMLType
from quant.gguf_metadata import BPEVocabulary, config_metadata, copied_metadata, rope_factor_tensors
from quant.gguf_reader import read_header
from quant.gguf_writer import TensorSource, write_gguf
from quant.mapping import MappedFile
from quant.model_file import ModelFile, open_model
from quant.rope_order import file_rows
from server.text.tokenizer import build_tokenizer
from tests.tiny_models import write_tiny_gguf
from tests.tiny_vocab import CHATML_TEMPLATE, byte_level_vocab


def vector(name: str, size: int = 5) -> TensorSource:
    return TensorSource(name, GGMLType.F32, (size,), lambda: [np.arange(size, dtype=np.float32)])


def copies(file: ModelFile) -> list[TensorSource]:
    return [TensorSource(t.name, t.type, t.shape, lambda t=t: [t.read()]) for t in file.tensors.values()]


def test_values_and_tensors_are_what_the_gguf_package_reads(tmp_path: Path) -> None:
    values = {
        "text": "Küste\n",
        "empty": "",
        "small": 7,
        "negative": -7,
        "huge": 2**40,
        "real": 0.5,
        "truth": True,
        "texts": ["a", "", "ö"],
        "counts": [1, -2, 3],
        "shares": [0.5, 1, 2.25],
        "flags": [True, False],
        "none": [],
        "array": np.array([1, 2], np.int64),
    }
    blocks = np.arange(2 * 34, dtype=np.uint8)
    matrix = TensorSource("matrix", GGMLType.Q8_0, (2, 32), lambda: iter([blocks[:34], blocks[34:].tobytes()]))
    write_gguf(tmp_path / "m.gguf", values, [vector("vector"), matrix])
    twin = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {k: f.contents() for k, f in twin.fields.items() if not k.startswith("GGUF.")} == values | {"array": [1, 2]}
    assert twin.fields["small"].types == [gguf.GGUFValueType.UINT32]
    assert twin.fields["counts"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert [(t.name, t.tensor_type.name) for t in twin.tensors] == [("vector", "F32"), ("matrix", "Q8_0")]
    assert twin.tensors[0].data.tolist() == [0, 1, 2, 3, 4]
    assert twin.tensors[1].data.tobytes() == blocks.tobytes()
    ours = MappedFile(tmp_path / "m.gguf")
    assert read_header(ours.data, ours.path).metadata == values | {"array": [1, 2]}


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_everything_of_a_file_can_be_written_again(tmp_path: Path, tokenizer: str) -> None:
    source = write_tiny_gguf(tmp_path / "source.gguf", tokenizer=tokenizer, metadata={"general.author": "nobody"})
    file = open_model(source)
    mapping = MappedFile(source)
    header = read_header(mapping.data, source)
    values = copied_metadata(header, mapping.data) | {"sterna.note": "x"}
    write_gguf(tmp_path / "copy.gguf", values, copies(file))
    copy = open_model(tmp_path / "copy.gguf")
    assert copy.config == file.config
    assert copy.tokenizer == file.tokenizer
    written = MappedFile(tmp_path / "copy.gguf")
    assert read_header(written.data, written.path).metadata == header.metadata | {"sterna.note": "x"}
    for name, tensor in file.tensors.items():
        assert copy.tensors[name].read().tobytes() == tensor.read().tobytes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "bitnet"])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_a_configuration_is_read_as_it_was_written(tmp_path: Path, architecture: str, factor: float | None) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "source.gguf", architecture=architecture, head_dim=32))
    config = replace(file.config, rope_freq_factors=(factor,) * 16 if factor else None)
    write_gguf(tmp_path / "m.gguf", config_metadata(config, GGMLType.F32), copies(file))
    assert open_model(tmp_path / "m.gguf").config == config


def test_rotary_factors_that_differ_are_a_tensor_for_llama_only(tmp_path: Path) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "source.gguf"))
    config = replace(file.config, rope_freq_factors=(1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, 8.0))
    tensors = [*copies(file), *rope_factor_tensors(config)]
    write_gguf(tmp_path / "m.gguf", config_metadata(config, GGMLType.F32), tensors)
    assert open_model(tmp_path / "m.gguf").config == config
    with pytest.raises(ModelFileError, match="rotary factors that differ have no place in a GGUF file of qwen2"):
        config_metadata(replace(config, architecture="qwen2"), GGMLType.F32)


def test_a_vocabulary_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = open_model(write_tiny_gguf(tmp_path / "source.gguf"))
    tiny = byte_level_vocab(384)
    vocabulary = BPEVocabulary(
        tiny.tokens, tiny.merges, tiny.token_types, "smollm", 1, 2, 0, 2, chat_template=CHATML_TEMPLATE
    )
    values = config_metadata(file.config, GGMLType.F32) | vocabulary.metadata()
    write_gguf(tmp_path / "m.gguf", values, copies(file))
    copy = open_model(tmp_path / "m.gguf")
    assert build_tokenizer(copy.tokenizer, 384).digest == build_tokenizer(file.tokenizer, 384).digest
    assert copy.tokenizer == file.tokenizer


def test_rows_of_q_and_k_go_into_the_files_order(tmp_path: Path) -> None:
    llama = open_model(write_tiny_gguf(tmp_path / "llama.gguf")).config
    rows = file_rows(llama, "blk.0.attn_k.weight")
    assert rows is not None
    assert rows[:4].tolist() == [0, 8, 1, 9]
    assert len(rows) == llama.num_kv_heads * llama.head_dim
    assert file_rows(llama, "blk.0.attn_v.weight") is None
    assert file_rows(replace(llama, architecture="qwen2"), "blk.0.attn_k.weight") is None


def test_nothing_is_left_when_a_tensor_cannot_be_read(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(4)
        raise ModelFileError("source", "not finite", tensor="x")

    with pytest.raises(ModelFileError, match="not finite"):
        write_gguf(tmp_path / "m.gguf", {}, [TensorSource("x", GGMLType.F32, (2,), broken)])
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(ModelFileError, match="x: the tensor occurs twice"):
        write_gguf(path, {}, [vector("x"), vector("x")])
    with pytest.raises(ModelFileError, match="more than 63 bytes"):
        write_gguf(path, {}, [vector("x" * 64)])
    with pytest.raises(ModelFileError, match=r"x: shape \(2, 48\) is no whole number of Q8_0's blocks of 32 a row"):
        write_gguf(path, {}, [TensorSource("x", GGMLType.Q8_0, (2, 48), lambda: [])])
    with pytest.raises(ModelFileError, match="No such file or directory"):
        write_gguf(tmp_path / "missing" / "m.gguf", {}, [])
    path.write_bytes(b"mine")
    with pytest.raises(ModelFileError, match="it exists already"):
        write_gguf(path, {}, [])
    assert path.read_bytes() == b"mine"
    write_gguf(path, {}, [vector("x")], overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]
