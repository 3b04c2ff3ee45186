"""What an adapter file becomes on its way into the core."""

from dataclasses import dataclass

from server.engine.core_api import FloatArray

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RANK = 64


@dataclass(frozen=True, eq=False, slots=True)
class LoraProjection:
    """One adapted matrix: y += scale * b @ (a @ x)."""

    layer: int
    projection: str
    a: FloatArray
    """(r, in)"""
    b: FloatArray
    """(out, r), rows in Hugging Face order (Q and K half-split, never GGUF's interleaved)."""
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class LoraWeights:
    rank: int
    """The largest rank among the projections."""
    projections: tuple[LoraProjection, ...]
    digest: str
    """"sha256:<hex>" over the configuration file and the tensor file."""
