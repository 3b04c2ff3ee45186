"""The settings of `sterna train`: typed, frozen, from the same sources as the server's (server/config.py).

The table [train] of a TOML file, variables `STERNA_TRAIN_...`, and flags. A run keeps what its result depends on with
its checkpoints: resumed with other values it is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.config import merge_settings

PART = "train"

OF_THE_PROCESS = frozenset({"device", "threads", "log_every", "checkpoint_every", "type"})
"""Fields on which no trained weight depends (but for the last bits)."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class QatSettings(BaseModel):
    """Everything a run can choose. `sterna train --help` is generated from these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- the model (ignored but for `ternary`, `group` and `embedding_type` where `base` is given)
    name: Annotated[str, Field(min_length=1)] = Field("sterna-nano", description="of the model, in its file")
    vocab_size: Count = Field(4096, description="tokens of the vocabulary that is made from the training dialogues")
    hidden_size: Count = Field(256, description="of the residual stream, a multiple of 256")
    intermediate_size: Count = Field(768, description="of the feed-forward part, a multiple of 256")
    layers: Count = Field(8, description="decoder layers")
    heads: Count = Field(4, description="query heads")
    kv_heads: Count = Field(2, description="key and value heads")
    head_dim: Count = Field(64, description="width of a head")
    context_length: Count = Field(1024, description="longest sequence that the file allows")
    tie_embeddings: bool = Field(True, description="the output head is the embedding")
    residual_streams: Literal[1, 2] = Field(1, description="2: two mixed streams, which only Sterna serves")
    ternary: Literal["absmean", "absmax"] = Field("absmean", description="scales: mean or largest magnitude")
    group: Literal[64, 128, 256] | None = Field(None, description="weights that share a scale [the whole tensor]")
    embedding_type: Literal["q8_0", "q4_0"] = Field("q8_0", description="of embedding and head in the file")
    type: Literal["tq2_0", "tq1_0", "q4_0"] | None = Field(
        None, description="of the ternary matrices in the file [tq2_0; q4_0 for groups of 64 and 128]"
    )
    base: Path | None = Field(None, description="begin with this llama model (GGUF or Hugging Face) [from scratch]")
    weights_from: Path | None = Field(
        None, description="begin with the newest weights of another run from scratch, in this folder [none]"
    )
    induction: bool = Field(False, description="from scratch: begin with attention that copies (induction.py)")
    induction_rate: Positive = Field(0.25, description="times the learning rate, for the tensors that induction wrote")
    ternary_after: Share = Field(
        0.0, description="share of the steps in which weights go from full precision to ternary; 0: ternary at once"
    )
    teacher: Path | None = Field(None, description="a model of the same vocabulary to learn from [none]")
    distillation: Share = Field(0.5, description="share of the teacher in the loss, where there is one")

    # -- training
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of the products")
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = Field("cpu", description="cpu or cuda")
    threads: Count | None = Field(
        None, description="threads that compute, in each process [its share of the physical cores]"
    )
    optimizer: Literal["adamw", "muon"] = Field("muon", description="of the layers' matrices; AdamW for the rest")
    learning_rate: Positive = Field(2e-3, description="the peak")
    schedule: Literal["cosine", "wsd"] = Field("wsd", description="wsd: warm-up, stable, decay")
    warmup_share: Share = Field(0.02, description="of the steps")
    decay_share: Share = Field(0.3, description="of the steps, at the end of wsd")
    weight_decay: NotNegative = Field(0.1, description="of matrices")
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to it")
    epochs: Positive = Field(1.0, description="passes over the training data")
    max_steps: Count | None = Field(None, description="optimizer steps at most [as the epochs say]")
    answer_weight: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="in the loss, of the tokens of answers that call nothing, but for the first and the last"
    )
    copying: NotNegative = Field(0.0, description="for each example so many of random tokens to copy (copying.py)")
    tokens_per_step: Count = Field(8192, description="real tokens of an optimizer step, about")
    micro_batch_tokens: Count = Field(4096, description="rows computed at once")
    entropy_weight: float = Field(0.0, allow_inf_nan=False, description="of the mean entropy, subtracted from the loss")
    evaluate_every: Count = Field(200, description="optimizer steps between two measures on held-out dialogues")
    max_held_out: Count = Field(400, description="held-out examples that are measured")
    patience: Count | None = Field(None, description="measures without a better one that end the run [never]")
    curriculum: bool = Field(False, description="four stages, from easy to hard")
    checkpoint_every: Count = Field(100, description="optimizer steps; what a kill can cost")
    log_every: Count = Field(20, description="optimizer steps between two lines of the log")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of the first weights and of orders")

    @model_validator(mode="after")
    def _shares_of_one_run(self) -> Self:
        if self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share and decay_share together are above 1")
        if self.induction and self.base is not None:
            raise ValueError("induction is for models from scratch; a base brings its own weights")
        if self.weights_from is not None and self.base is not None:
            raise ValueError("weights_from and base: a run begins with one of them")
        return self

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        return self.model_dump(mode="json", exclude=set(OF_THE_PROCESS))


def load_qat_settings(
    flags: Mapping[str, Any] | None = None, *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> QatSettings:
    """`flags` by field name. Raises ConfigError whose message has one line for each problem."""
    return merge_settings(QatSettings, flags, file=file, environ=environ, part=PART)
