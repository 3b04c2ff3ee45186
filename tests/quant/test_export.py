"""Models written anew: types chosen in one place, the quantizers' bytes, measured errors, nothing half-written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.errors import ModelFileError
from quant.export import TensorReport, export_gguf, gguf_metadata, written_bytes
from quant.export_types import TypeChoice, choose_types, fitting_type
from quant.formats import GGMLType
from quant.gguf_metadata import config_metadata
from quant.gguf_reader import read_header
from quant.mapping import MappedFile
from quant.model_file import ModelFile, open_model
from quant.quantize import dequantize, quantize
from quant.rope_order import file_rows
from quant.ternary import absmean_scale, unpack_tq2_0
from tests.tiny_models import bfloat16_bits, tiny_weights, write_tiny_gguf, write_tiny_hf
from tests.tiny_weights import TinyShape

F32, F16, Q8_0, Q4_0, TQ1_0, TQ2_0 = (
    GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.TQ1_0, GGMLType.TQ2_0
)  # fmt: skip
WIDE: dict[str, Any] = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}


def choices_of(file: ModelFile, wanted: GGMLType, *keep: tuple[str, GGMLType]) -> dict[str, TypeChoice]:
    return choose_types(file.path, {n: (t.type, t.shape) for n, t in file.tensors.items()}, wanted, keep)


def export(file: ModelFile, path: Path, wanted: GGMLType, **arguments: Any) -> list[TensorReport]:
    is_gguf = file.tokenizer.kind == "gguf"
    metadata = gguf_metadata(file, wanted) if is_gguf else config_metadata(file.config, wanted)
    return export_gguf(file, path, choices_of(file, wanted), metadata, **arguments)


@pytest.mark.parametrize(
    ("wanted", "columns", "type_"),
    [(TQ2_0, 512, TQ2_0), (TQ1_0, 288, Q4_0), (TQ2_0, 100, F16), (Q8_0, 64, Q8_0), (Q4_0, 40, F16), (F32, 7, F32)],
)
def test_rows_that_do_not_fit(wanted: GGMLType, columns: int, type_: GGMLType) -> None:
    assert fitting_type(wanted, columns) is type_


def test_types_are_chosen_by_name_shape_and_what_there_is() -> None:
    tensors = {
        "token_embd.weight": (F32, (300, 256)),
        "output.weight": (GGMLType.Q6_K, (300, 256)),
        "blk.0.attn_norm.weight": (F16, (256,)),
        "blk.0.attn_q.weight": (F32, (256, 256)),
        "blk.0.attn_k.weight": (GGMLType.Q4_K, (256, 256)),
        "blk.0.ffn_down.weight": (F32, (256, 288)),
        "blk.0.ffn_up.weight": (GGMLType.Q4_1, (256, 288)),
        "blk.0.ffn_gate.weight": (F32, (256, 100)),
        "blk.0.residual_streams": (F32, (2, 5)),
    }
    found = choose_types(Path("m"), tensors, TQ2_0, [("blk.*.attn_k.*", Q8_0), ("blk.0.*", TQ2_0)])
    assert {name: (choice.type.name, choice.note) for name, choice in found.items()} == {
        "token_embd.weight": ("Q8_0", "embedding"),
        "output.weight": ("Q6_K", "head"),
        "blk.0.attn_norm.weight": ("F32", "a vector"),
        "blk.0.attn_q.weight": ("TQ2_0", "--keep"),
        "blk.0.attn_k.weight": ("Q8_0", "--keep"),
        "blk.0.ffn_down.weight": ("Q4_0", "rows of 288, no multiple of 256"),
        "blk.0.ffn_up.weight": ("Q4_1", "rows of 288, no multiple of 256"),
        "blk.0.ffn_gate.weight": ("F16", "rows of 100, no multiple of 256"),
        "blk.0.residual_streams": ("F32", "not a weight"),
    }
    assert choose_types(Path("m"), tensors, Q8_0)["token_embd.weight"] == TypeChoice(Q8_0)
    with pytest.raises(ModelFileError, match=r"no matrix has a name like 'blk\.0\.attn_norm\.weight'"):
        choose_types(Path("m"), tensors, Q8_0, [("blk.0.attn_norm.weight", F32)])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "bitnet"])
@pytest.mark.parametrize("wanted", [F32, Q8_0, TQ2_0, TQ1_0])
def test_a_directory_becomes_a_file_of_the_same_weights(tmp_path: Path, architecture: str, wanted: GGMLType) -> None:
    file = open_model(write_tiny_hf(tmp_path / "hf", architecture=architecture, tie=False, **WIDE))
    progress: list[int] = []
    reports = export(file, tmp_path / "m.gguf", wanted, progress=progress.append)
    assert progress[-1] == written_bytes(file, choices_of(file, wanted)) == sum(r.num_bytes for r in reports)
    written = open_model(tmp_path / "m.gguf")
    weights = tiny_weights(TinyShape(architecture, tie=False, **WIDE))
    assert set(written.tensors) == set(weights)
    for report in reports:
        tensor = written.tensors[report.name]
        expected = weights[report.name]
        rows = file_rows(file.config, report.name)
        assert (rows is not None) is tensor.rope_interleaved
        if rows is not None:
            expected = expected[rows]
        data = quantize(np.ascontiguousarray(expected).reshape(-1).view(np.uint8), F32, tensor.type)
        assert tensor.type is report.choice.type
        assert np.array_equal(tensor.read(), data)
        error = np.linalg.norm(dequantize(data, tensor.type) - expected.reshape(-1)) / np.linalg.norm(expected)
        assert report.relative_error == pytest.approx(error, rel=1e-4, abs=1e-9)


def test_a_file_keeps_its_metadata_its_order_and_what_has_its_type_already(tmp_path: Path) -> None:
    factors = np.linspace(1, 4, 32, dtype=np.float32)
    source = write_tiny_gguf(
        tmp_path / "s.gguf", linear_type=Q8_0, rope_freqs=factors, metadata={"general.author": "x"}, **WIDE
    )
    file = open_model(source)
    reports = export(file, tmp_path / "m.gguf", TQ1_0)
    old, new = (MappedFile(path) for path in (source, tmp_path / "m.gguf"))
    before, after = (read_header(mapping.data, mapping.path) for mapping in (old, new))
    labels = {"general.file_type": 36, "general.quantization_version": 2}
    assert after.metadata == before.metadata | labels
    assert list(after.tensors) == list(before.tensors)
    written = open_model(tmp_path / "m.gguf")
    assert written.config == file.config
    assert written.tokenizer == file.tokenizer
    assert np.array_equal(written.tensors["token_embd.weight"].read(), file.tensors["token_embd.weight"].read())
    by_name = {report.name: report for report in reports}
    assert by_name["token_embd.weight"].relative_error == 0
    wide = dequantize(file.tensors["blk.0.ffn_up.weight"].read(), Q8_0)
    assert np.array_equal(written.tensors["blk.0.ffn_up.weight"].read(), quantize(wide.view(np.uint8), F32, TQ1_0))


def test_slices_are_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_model(write_tiny_hf(tmp_path / "hf", dtype="bfloat16", **WIDE))
    export(file, tmp_path / "whole.gguf", TQ2_0)
    monkeypatch.setattr("quant.export._SLICE_ELEMENTS", 1000)
    export(file, tmp_path / "slices.gguf", TQ2_0)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "slices.gguf").read_bytes()


def test_one_scale_a_tensor(tmp_path: Path) -> None:
    file = open_model(write_tiny_hf(tmp_path / "hf", **WIDE))
    export(file, tmp_path / "m.gguf", TQ2_0, absmean=True)
    blocks = open_model(tmp_path / "m.gguf").tensors["blk.1.ffn_down.weight"].read().reshape(-1, 66)
    weights = tiny_weights(TinyShape(**WIDE))["blk.1.ffn_down.weight"]
    scale = absmean_scale(float(np.abs(weights).sum(dtype=np.float64)), weights.size)
    assert (unpack_tq2_0(blocks)[1] == np.float16(scale)).all()


def test_a_tensor_of_zeros_has_no_error(tmp_path: Path) -> None:
    zeros = {"blk.0.ffn_up.weight": np.zeros((512, 256), np.float32)}
    file = open_model(write_tiny_hf(tmp_path / "hf", replace=zeros, **WIDE))
    for type_ in (TQ1_0, TQ2_0, Q4_0, Q8_0):
        reports = export(file, tmp_path / f"{type_.name}.gguf", type_)
        assert next(r for r in reports if r.name == "blk.0.ffn_up.weight").relative_error == 0
        data = open_model(tmp_path / f"{type_.name}.gguf").tensors["blk.0.ffn_up.weight"].read()
        assert not dequantize(data, type_).any()


@pytest.mark.parametrize("wanted", [F32, F16, Q8_0, Q4_0, TQ1_0, TQ2_0])
@pytest.mark.parametrize("name", ["blk.1.ffn_gate.weight", "blk.1.ffn_norm.weight"])
@pytest.mark.parametrize("absmean", [False, True])
def test_a_value_that_is_not_finite_is_named_and_leaves_nothing(
    tmp_path: Path, wanted: GGMLType, name: str, absmean: bool
) -> None:
    weights = tiny_weights(TinyShape(**WIDE))[name]
    weights.reshape(-1)[77] = np.nan
    file = open_model(write_tiny_hf(tmp_path / "hf", replace={name: weights}, **WIDE))
    with pytest.raises(ModelFileError, match="not finite") as failure:
        export(file, tmp_path / "m.gguf", wanted, absmean=absmean)
    assert failure.value.tensor is not None
    assert failure.value.tensor.startswith("model.layers.1.")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_large_values_of_bf16(tmp_path: Path) -> None:
    weights = np.full((512, 256), 1e30, np.float32)
    file = open_model(
        write_tiny_hf(tmp_path / "hf", dtype="bfloat16", replace={"blk.0.ffn_up.weight": weights}, **WIDE)
    )
    assert bfloat16_bits(weights)[0, 0]
    export(file, tmp_path / "b.gguf", GGMLType.BF16)
    with pytest.raises(ModelFileError, match=r"layers\.0\.mlp\.up_proj\.weight: .* too large to quantize"):
        export(file, tmp_path / "m.gguf", F16)
