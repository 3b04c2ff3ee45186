"""Open a model: a GGUF file, a directory that holds one, or a Hugging Face directory of safetensors.

Never reads pickle (.bin, .pt): it runs code. What comes back is described in `model_types.py`.
"""

from pathlib import Path

from quant.errors import ModelFileError
from quant.gguf_model import open_gguf
from quant.hf_directory import open_directory
from quant.model_types import ModelConfig, ModelFile, Quantize, Tensor, TokenizerSource

__all__ = ["ModelConfig", "ModelFile", "Quantize", "Tensor", "TokenizerSource", "open_model"]

HF_CONFIG = "config.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_model(path: str | Path, *, quantize: Quantize | None = None, digest_cache: Path | None = None) -> ModelFile:
    """Open and check a model; weights are read when asked for. Raises ModelFileError.

    `quantize` is for Hugging Face directories: linear weights and embedding are quantized as they are read.
    `digest_cache` is a folder that remembers digests of files; None remembers nothing.
    """
    path = Path(path)
    if path.is_dir() and not (path / HF_CONFIG).exists():
        path = _only_gguf(path)
    if path.is_dir():
        return open_directory(path, quantize=quantize, digest_cache=digest_cache)
    if path.suffix in _PICKLE_SUFFIXES:
        raise ModelFileError(path, "pickle files are not read, they can run code; convert it to safetensors or GGUF")
    if path.suffix == ".safetensors":
        raise ModelFileError(path, "one file is not a model; give the directory that also holds config.json")
    if quantize is not None:
        raise ModelFileError(path, f"quantizing to {quantize} is for Hugging Face directories; this is a GGUF file")
    return open_gguf(path, digest_cache=digest_cache)


def _only_gguf(folder: Path) -> Path:
    """Raises ModelFileError for none or several."""
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise ModelFileError(folder, f"neither a .gguf file nor {HF_CONFIG} (of a Hugging Face directory) is in it")
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ModelFileError(folder, f"{len(found)} .gguf files are in it, give the path of one: {names}")
    return found[0]
