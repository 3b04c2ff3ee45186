"""The settings of the sidecar: typed, frozen, from the same sources as the server's (server/config.py).

The table [finetune] of sterna.toml, variables `STERNA_FINETUNE_...`, and flags of `sterna finetune` (of `sterna up`:
`--finetune-...`). A round keeps the values that it began with, also when it is resumed under others. What the server
and the sidecar share (the model, the database, data_dir, logs) is in the server's `Settings`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from server.config import merge_settings, one_or_many

PART = "finetune"

OF_THE_PROCESS = frozenset({
    "adapters", "host", "port", "min_new_traces", "every_hours", "poll_seconds", "webhook_urls", "webhook_secret",
    "nice", "busy_requests", "busy_share", "server_patience_minutes", "gate_concurrency", "episode_idle_minutes",
    "hold_back_share",
})  # fmt: skip
"""Fields on which no round's result depends."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_RANK = "(q|k|v|o|gate|up|down)_proj=[1-9][0-9]?"


def _can_be_asked(url: str) -> str:
    import httpx  # 40 ms, which a sidecar that tells nobody does not need here

    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"it is no URL: {error}") from None
    return url


WebhookUrl = Annotated[str, Field(pattern=r"^https?://[^/\s]+"), AfterValidator(_can_be_asked)]


class FinetuneSettings(BaseModel):
    """Everything an operator can choose. `sterna finetune --help` is generated from these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # -- the sidecar
    adapters: Annotated[tuple[str, ...], BeforeValidator(one_or_many)] = Field(
        (), description="an adapter to train (a list of them in sterna.toml) [all that the registry has]"
    )
    host: Annotated[str, Field(min_length=1)] = Field("127.0.0.1", description="address of metrics and triggers")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8001, description="their port; 0 picks a free one")
    min_new_traces: Count = Field(200, description="new traces with a usable label after which a round begins")
    every_hours: Positive | None = Field(None, description="a round every so many hours, if anything is new [never]")
    episode_idle_minutes: Positive = Field(10.0, description="an episode is over when nothing came for so long")
    poll_seconds: Positive = Field(30.0, description="between two looks at what is new, and at canaries")
    webhook_urls: Annotated[tuple[WebhookUrl, ...], BeforeValidator(one_or_many)] = Field(
        (), description="a URL (a list in sterna.toml) that hears of promoted, rejected and rolled back versions [none]"
    )
    webhook_secret: SecretStr | None = Field(
        None, description="signs webhooks; better as STERNA_FINETUNE_WEBHOOK_SECRET, where no process list shows it"
    )

    # -- beside serving
    nice: Annotated[int, Field(ge=0, le=19)] = Field(5, description="how far the process steps back for others")
    busy_requests: Count = Field(1, description="requests running or waiting from which on serving counts as busy")
    busy_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the time in which training computes while serving is busy"
    )
    server_patience_minutes: Positive = Field(
        30.0, description="how long a server that is down is waited for; then the round waits for a later run"
    )

    # -- training
    rank: Annotated[int, Field(ge=1, le=64)] = Field(16, description="of the LoRA matrices")
    ranks: Annotated[str, Field(pattern=rf"^{_RANK}(,{_RANK})*$")] | None = Field(
        None, description="other ranks by projection, as q_proj=8,down_proj=32 [all have the rank]"
    )
    alpha: Positive = Field(32.0, description="of LoRA: the scale is alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of LoRA's input")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    learning_rate: Positive = Field(5e-4, description="the peak")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="of the adapter's matrices")
    schedule: Literal["cosine", "wsd"] = Field("cosine", description="wsd: warm-up, stable, decay")
    epochs: Positive = Field(1.0, description="passes over the training data")
    max_steps: Count | None = Field(None, description="optimizer steps at most [as the epochs say]")
    tokens_per_step: Count = Field(
        2048, description="real tokens of an optimizer step, about; two halves of micro-batch-tokens at least"
    )
    # On the demonstration's traces 2048 computes 11 % fewer rows than 1024, which shares fewer prompts, and leaves none
    # of them without others beside it; with 1024 that is a third.
    micro_batch_tokens: Count = Field(
        2048,
        description="rows computed at once, in two halves; training pauses between them (a longer example: alone)",
    )
    structure_weight: Positive = Field(1.0, description="loss weight of a call's braces, quotes and markers")
    tool_name_weight: Positive = Field(1.0, description="loss weight of tools' names")
    argument_key_weight: Positive = Field(1.0, description="loss weight of arguments' names")
    argument_value_weight: Positive = Field(1.0, description="loss weight of arguments' values")
    answer_weight: Positive = Field(
        1.0, description="loss weight of plain answers: more of it teaches when not to call"
    )
    thinking_weight: Positive = Field(1.0, description="loss weight of reasoning")
    # Losses that are off until an ablation over seeds shows a gain (benchmarks/ablations.py).
    dpo_weight: NotNegative = Field(
        0.0, description="of preferring corrections to the answers that they correct, beside learning them [off]"
    )
    dpo_beta: Positive = Field(0.1, description="of it: how far from the first model a preference may lead")
    sequence_weight: NotNegative = Field(0.0, description="of a call's chance to be sampled complete and right [off]")
    call_head_weight: NotNegative = Field(
        0.0, description="of telling from the prompt whether a tool is called, with a head that is not exported [off]"
    )
    distrust: bool = Field(False, description="weight examples by who vouches for them (finetune/dataset/distrust.py)")
    min_score: Share = Field(0.5, description="least score of an answer that is learned from")
    keep_unlabelled: bool = Field(False, description="also learn from answers that nobody judged")
    min_examples: Count = Field(1, description="examples without which a round has nothing to learn")
    general_prompts: Annotated[int, Field(ge=0)] | None = Field(
        None, description="everyday prompts whose answers by the base are held on to, 0 for none [all that we have]"
    )
    curriculum: bool = Field(False, description="easy examples first")
    upcast: bool = Field(
        False, description="residual stream and attention scores in float32: less rounding, a twelfth more time"
    )
    checkpointing: bool = Field(
        False, description="run each layer again for its gradients: a third slower, for contexts that do not fit"
    )
    max_example_tokens: Count = Field(2048, description="longer examples are left out, and counted")
    checkpoint_every: Count = Field(20, description="optimizer steps; what a kill can cost")
    # Off: in one epoch every example is new when its step comes, so the training loss tells the same for nothing, and
    # the schedule ends at its floor. It pays where epochs > 1.
    evaluate_every: Count | None = Field(
        None, description="optimizer steps between two losses on a validation part; the best one is kept [never]"
    )
    patience: Count | None = Field(None, description="such losses without a better one that end training [never]")
    validation_share: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.05, description="of the training side's clusters, validated on at most, and not trained on"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of orders and of the first weights")

    # -- gate and watch
    gate_concurrency: Annotated[int, Field(ge=1, le=64)] = Field(4, description="held-out requests asked at once")
    gate_max_tokens: Count = Field(256, description="longest answer to a held-out request")
    gate_max_traces: Count = Field(1000, description="held-out traces at most, the newest")
    min_clusters: Count = Field(
        100, description="fresh labelled held-out episodes without which the gate decides nothing"
    )
    min_stratum_clusters: Count = Field(
        25, description="of them, with a trace that expects a call, and with one that expects none"
    )
    canary_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2,
        description="share of episodes that a version answers after the gate, beside the others",
    )
    hold_back_share: Share = Field(0.1, description="share that stays on the predecessor after a promotion")

    @model_validator(mode="after")
    def _webhooks_are_signed(self) -> Self:
        if self.webhook_urls and self.webhook_secret is None:
            raise ValueError("webhook_urls needs webhook_secret: whoever receives one must be able to check it")
        return self

    @model_validator(mode="after")
    def _patience_has_something_to_wait_for(self) -> Self:
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience needs evaluate_every: it counts evaluations")
        return self

    def of_round(self) -> dict[str, Any]:
        """What a round keeps: every value that its result depends on."""
        return self.model_dump(exclude=set(OF_THE_PROCESS))

    def with_round(self, kept: Mapping[str, Any]) -> "FinetuneSettings":
        """These settings with a round's own in their place."""
        return self.model_validate(self.model_dump() | dict(kept))


def load_finetune_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flag_prefix: str = "",
) -> FinetuneSettings:
    """`flags` by field name. Raises ConfigError whose message has one line for each problem."""
    return merge_settings(FinetuneSettings, flags, file=file, environ=environ, part=PART, flag_prefix=flag_prefix)
