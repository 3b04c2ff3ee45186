"""Open a Hugging Face directory as a model: config.json, *.safetensors (one, or several with an index), tokenizer.

Tensors get their GGUF names; Q and K rows stay in half-split order. With `quantize`, linear weights and the embedding
become Q8_0 or Q4_0 when they are read; norms and biases stay as they are. Weights that are quantized already become
what `hf_quantized.py` makes of them. Pickle files (.bin) are refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.digest import combined_digest
from quant.errors import ModelFileError
from quant.formats import BLOCK, GGMLType
from quant.hf_config import read_config
from quant.hf_names import IGNORED_SUFFIXES, gguf_name, hf_name
from quant.hf_quantized import Packed, Scheme, gather, read_scheme
from quant.mapping import MappedFile
from quant.model_types import ModelFile, Quantize, Tensor, TokenizerSource
from quant.quantize import quantize as quantize_rows
from quant.safetensors_reader import ByteTensor, SafeTensor, read_packed_tensors
from quant.tensor_rules import EMBEDDING, HEAD, check_tensors

_INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")  # no folder: nothing outside the directory is read
_TARGETS: dict[Quantize, GGMLType] = {"q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}
_DIGESTED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, eq=False)
class _Quantized:
    """A tensor's bytes quantized each time they are read."""

    name: str
    source: SafeTensor
    target: GGMLType

    def read(self) -> np.ndarray:
        try:
            return quantize_rows(self.source.data.read(), self.source.type, self.target)
        except ValueError as error:
            raise ModelFileError(self.source.data.file.path, str(error), tensor=self.name) from error

    def release(self) -> None:
        self.source.data.release()


def open_directory(path: Path, *, quantize: Quantize | None = None, digest_cache: Path | None = None) -> ModelFile:
    """Map and check a directory; reads no weights. Raises ModelFileError."""
    config_path = path / "config.json"
    values = _read_object(config_path)
    scheme = read_scheme(config_path, values.pop("quantization_config", None))
    config, notes = read_config(config_path, values, path.resolve().name)
    target = _TARGETS[quantize] if quantize else None
    mappings: list[MappedFile] = []
    try:
        found, packed_notes = _find_tensors(path, scheme, target, mappings)
        if config.tie_embeddings and HEAD in found:
            _check_equal(path, found.pop(HEAD), found.get(EMBEDDING))
        check_tensors(path, config, {name: (t.type, t.shape) for name, t in found.items()}, display=hf_name)
        tokenizer = _read_tokenizer(path)
    except ModelFileError:
        for mapping in mappings:
            mapping.close()
        raise
    tensors = {name: _tensor(name, source, target) for name, source in found.items()}
    floats = {name: tensor for name, tensor in tensors.items() if isinstance(found[name], SafeTensor)}
    kept = [name for name, t in floats.items() if target and len(t.shape) == 2 and t.type is not target]
    if kept:
        note = f"{len(kept)} tensors whose rows are no multiple of {BLOCK[GGMLType.Q8_0][0]} stay as they are: "
        notes += (note + ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else ""),)
    notes += packed_notes
    others = [path / name for name in _DIGESTED if (path / name).is_file()]
    return ModelFile(
        path=path,
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        notes=notes,
        mappings=mappings,
        compute_digest=lambda: f"sha256:{combined_digest(mappings, others, digest_cache, suffix=quantize or '')}",
    )


def _tensor(name: str, source: SafeTensor | Packed, target: GGMLType | None) -> Tensor:
    if target is None or isinstance(source, Packed) or len(source.shape) != 2 or source.shape[1] % BLOCK[target][0]:
        return Tensor(name, source.type, source.shape, rope_interleaved=False, data=source.data)
    data = _Quantized(hf_name(name), source, target)
    return Tensor(name, target, source.shape, rope_interleaved=False, data=data)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ModelFileError(path, "the text is not UTF-8") from error
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(path, f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(path, "not a JSON object")
    return value


def _find_tensors(
    path: Path, scheme: Scheme, target: GGMLType | None, mappings: list[MappedFile]
) -> tuple[dict[str, SafeTensor | Packed], tuple[str, ...]]:
    """Weights by GGUF name, and notes; `mappings` gets the files, also when this fails half-way."""
    files, weight_map = _weight_files(path)
    raw: dict[str, SafeTensor | ByteTensor] = {}
    for file in files:
        mapping = MappedFile(file)
        mappings.append(mapping)
        for name, tensor in read_packed_tensors(mapping).items():
            if name.endswith(IGNORED_SUFFIXES):
                continue
            if weight_map is not None and weight_map.get(name) != file.name:
                raise ModelFileError(file, f"{_INDEX} does not place it in this file", tensor=name)
            if name in raw:
                raise ModelFileError(file, "the tensor occurs twice", tensor=name)
            raw[name] = tensor
    for name, file_name in (weight_map or {}).items():
        if not name.endswith(IGNORED_SUFFIXES) and name not in raw:
            raise ModelFileError(path / file_name, f"the tensor that {_INDEX} places here is missing", tensor=name)
    whole, notes = gather(scheme, raw, target)
    found: dict[str, SafeTensor | Packed] = {}
    for name, weight in whole.items():
        translated = gguf_name(name)
        if translated is None:
            raise ModelFileError(raw[name].data.file.path, "a tensor that these architectures do not have", tensor=name)
        found[translated] = weight
    return found, notes


def _weight_files(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The safetensors files to read, and which tensor the index places in which."""
    if (path / _INDEX).is_file():
        weight_map = _read_object(path / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(path / _INDEX, "no weight_map from tensors to files", tensor="weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise ModelFileError(path / _INDEX, f"{file!r} is not the name of a safetensors file", tensor=name)
        return [path / file for file in sorted(set(weight_map.values()))], weight_map
    files = sorted(path.glob("*.safetensors"))
    single = path / "model.safetensors"
    if single in files or len(files) == 1:
        return [single if single in files else files[0]], None
    if files:
        raise ModelFileError(path, f"{len(files)} safetensors files, but no {_INDEX} that orders them")
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelFileError(path, "only pickle files (.bin), which can run code and are not read; save as safetensors")
    raise ModelFileError(path, "no *.safetensors file")


def _check_equal(path: Path, head: SafeTensor | Packed, embedding: SafeTensor | Packed | None) -> None:
    """tie_word_embeddings with a head in the file as well: fine if it is the embedding once more."""
    if embedding is None or head.type is not embedding.type or head.shape != embedding.shape:
        equal = False
    else:
        equal = np.array_equal(head.data.read(), embedding.data.read())
        head.data.release()
        embedding.data.release()
    if not equal:
        reason = "differs from the embedding although config.json says tie_word_embeddings"
        raise ModelFileError(path, reason, tensor=hf_name(HEAD))


def _read_tokenizer(path: Path) -> TokenizerSource:
    optional = {
        name: path / name for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    }
    metadata: dict[str, Any] = {}
    if optional["tokenizer_config.json"].is_file():
        metadata = _read_object(optional["tokenizer_config.json"])
    if optional["generation_config.json"].is_file():
        metadata["generation_config"] = _read_object(optional["generation_config.json"])
    if optional["chat_template.jinja"].is_file():
        metadata["chat_template"] = _read_text(optional["chat_template.jinja"])
    return TokenizerSource("hf", metadata, _read_text(path / "tokenizer.json"))
