"""How a run is trained: plain, checked numbers that are stored with every checkpoint.

What is trained on is not here (finetune/dataset), nor what the model is (finetune/model).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from finetune.errors import TrainingError

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["cosine", "wsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Raises TrainingError for values that make no sense together."""

    num_steps: int
    """Optimizer steps in all; the schedule is laid over them."""
    learning_rate: float = 5e-4
    """The peak."""
    optimizer: OptimizerName = "adamw"
    schedule: ScheduleName = "cosine"
    warmup_share: float = 0.05
    """Of the steps, in which the rate rises linearly."""
    decay_share: float = 0.2
    """Of the steps, in which warm-up-stable-decay falls to the floor."""
    floor_share: float = 0.1
    """Of the peak, where the schedule ends."""
    beta1: float = 0.9
    beta2: float = 0.99
    """0.999 remembers a thousand steps; a round has a few hundred."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 0
    """Steps between two evaluations on validation data; 0: never."""
    patience: int = 0
    """Evaluations without a better one after which training stops early; 0: never."""
    checkpoint_every: int = 20
    """Steps between two checkpoints: what a kill can cost."""
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, accepted is {accepted}"
            for name, value, accepted, is_good in (
                ("num_steps", self.num_steps, "at least 1", self.num_steps >= 1),
                ("learning_rate", self.learning_rate, "above 0", 0 < self.learning_rate < float("inf")),
                ("warmup_share", self.warmup_share, "0 to 1", 0 <= self.warmup_share <= 1),
                ("decay_share", self.decay_share, "0 to 1", 0 <= self.decay_share <= 1),
                ("floor_share", self.floor_share, "0 to 1", 0 <= self.floor_share <= 1),
                ("max_grad_norm", self.max_grad_norm, "above 0", self.max_grad_norm > 0),
                ("eval_every", self.eval_every, "0 or more", self.eval_every >= 0),
                ("patience", self.patience, "0 or more", self.patience >= 0),
                ("checkpoint_every", self.checkpoint_every, "at least 1", self.checkpoint_every >= 1),
            )
            if not is_good
        ]
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            problems.append(
                f"warmup_share + decay_share is {self.warmup_share + self.decay_share}, at most 1 is accepted"
            )
        if problems:
            raise TrainingError("; ".join(problems))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
