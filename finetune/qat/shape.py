"""The shape of a model that is trained from scratch, and what it will be exported as: one frozen, checked object.

Llama architecture, with one or two residual streams. Every row is a multiple of 256, because ternary blocks are; with
groups of 64 or 128, which are exported as Q4_0 blocks, a multiple of these.
Parameters have their GGUF names and, for Q and K, half-split rows (quant/rope_order.py); the export permutes them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finetune.errors import TrainingError
from finetune.qat.quantizers import Ternary
from quant.formats import GGMLType
from quant.model_types import ModelConfig
from quant.tensor_rules import EMBEDDING, HEAD, STREAMS, expected_tensors

ROW = 256
STREAM_SHAPE = (2, 5)

EmbeddingType = Literal["q8_0", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Raises TrainingError for what fits no file or no kernel."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context_length: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    residual_streams: int = 1
    ternary: Ternary = field(default_factory=Ternary)
    embedding_type: EmbeddingType = "q8_0"
    """Of the embedding and the head."""
    name: str = "sterna-nano"

    def __post_init__(self) -> None:
        queries, row = self.num_heads * self.head_dim, self.ternary.group or ROW
        rows = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        problems = [
            f"{name} is {value}, accepted are multiples of {row}"
            for name, value in (rows | {"num_heads * head_dim": queries}).items()
            if value < 1 or value % row
        ]
        problems += [
            f"{name} is {value}, accepted is {accepted}"
            for name, value, accepted, is_good in (
                ("vocab_size", self.vocab_size, "at least 2", self.vocab_size >= 2),
                ("num_layers", self.num_layers, "at least 1", self.num_layers >= 1),
                ("num_kv_heads", self.num_kv_heads, f"a divisor of {self.num_heads}", self._is_grouped()),
                (
                    "head_dim",
                    self.head_dim,
                    "an even number up to 512",
                    self.head_dim % 2 == 0 and 2 <= self.head_dim <= 512,
                ),
                ("context_length", self.context_length, "at least 1", self.context_length >= 1),
                ("residual_streams", self.residual_streams, "1 or 2", self.residual_streams in (1, 2)),
                ("embedding_type", self.embedding_type, "q8_0 or q4_0", self.embedding_type in ("q8_0", "q4_0")),
            )
            if not is_good
        ]
        if problems:
            raise TrainingError("; ".join(problems))

    def _is_grouped(self) -> bool:
        return self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0

    @property
    def matrix_type(self) -> GGMLType:
        """What the ternary matrices are exported as by default: smaller groups than TQ's have a place in Q4_0 only."""
        return GGMLType.Q4_0 if self.ternary.group in (64, 128) else GGMLType.TQ2_0

    def config(self) -> ModelConfig:
        """As the served file will say it."""
        return ModelConfig(
            architecture="llama",
            name=self.name,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            rope_dim=self.head_dim,
            rope_freq_factors=None,
            qkv_bias=False,
            qk_norm=False,
            tie_embeddings=self.tie_embeddings,
            residual_streams=self.residual_streams,
        )

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """In the order of the forward pass; the streams' scalars as a vector, so that no optimizer takes them for a
        matrix."""
        flat = (STREAM_SHAPE[0] * STREAM_SHAPE[1],)
        return {name: flat if name.endswith(STREAMS) else shape for name, shape in expected_tensors(self.config())}

    @property
    def num_parameters(self) -> int:
        total = 0
        for shape in self.parameter_shapes().values():
            total += shape[0] if len(shape) == 1 else shape[0] * shape[1]
        return total

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def stream_name(layer: int) -> str:
    return f"blk.{layer}.{STREAMS}"


def is_ternary(name: str) -> bool:
    """Whether a parameter is one of a layer's matrices."""
    return name.startswith("blk.") and name.endswith(".weight") and "_norm." not in name


VOCABULARY_TENSORS = frozenset((EMBEDDING, HEAD))
"""Matrices that Muon is not for."""
