"""A version as llama.cpp's LoRA file: PEFT's names as the base's GGUF names, and in the metadata where it comes from.

The base model is the store's: its architecture and head counts decide how rows are ordered, so a version of another
base is refused. Not here: the file itself (quant/lora_gguf.py).
"""

from pathlib import Path

from quant.errors import ModelFileError
from quant.hf_names import gguf_name
from quant.lora_gguf import LoraPair, write_lora_gguf
from server.adapters.store import VersionStore
from server.adapters.version import Version
from server.engine.lora_types import LoraProjection, LoraWeights
from server.errors import AdapterError, InvalidRequestError


def export_gguf(store: VersionStore, version: Version, target: Path) -> tuple[str, ...]:
    """Write `target`, whole or not at all; gives the base tensors whose B has a part of the scale in it.

    Raises InvalidRequestError where such a file cannot hold the version, AdapterError where its files or the disk fail.
    """
    base = store.base
    if version.base_digest != base.digest:
        raise InvalidRequestError(
            f"{version.ref} was trained on the base {version.base_digest}, and GGUF's row order is the base's own: "
            f"this server's is {base.digest}"
        )
    facts = {
        "general.name": str(version.ref),
        "sterna.version": str(version.ref),
        "sterna.digest": version.digest,
        "sterna.base_digest": version.base_digest,
    }
    try:
        return write_lora_gguf(target, base.config, lora_pairs(store.load(version)), facts)
    except ModelFileError as error:
        if error.tensor is None:  # the disk, not the version
            raise AdapterError(error.reason) from error
        raise InvalidRequestError(
            f"{version.ref} cannot be written for llama.cpp: {error.tensor}: {error.reason}"
        ) from error


def lora_pairs(weights: LoraWeights) -> list[LoraPair]:
    """In layer order."""
    return [LoraPair(_base_tensor(part), part.a, part.b, part.scale) for part in weights.projections]


def _base_tensor(part: LoraProjection) -> str:
    block = "self_attn" if part.projection in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    name = gguf_name(f"model.layers.{part.layer}.{block}.{part.projection}.weight")
    assert name is not None, part.projection
    return name
