"""How the demonstration's rounds are trained: flags of `sterna finetune`, and why they are what they are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    flags: tuple[str, ...]


_GATE = ("--gate-max-tokens", "128", "--gate-concurrency", "8", "--canary-share", "0.5")
"""The longest right answer has 106 tokens. At a half of the traffic the watch needs about 150 episodes."""

TOOLS = Recipe(
    (
        *("--epochs", "3", "--tokens-per-step", "2048", "--learning-rate", "6e-4"),
        *("--answer-weight", "3", "--argument-value-weight", "2"),
        *("--general-prompts", "90", *_GATE),
    )
)
"""A step is two micro-batches. A call has 45 tokens and a refusal 12: at equal weights not calling is a tenth of the
loss, and is learned too late; of a call's tokens its values are what is still wrong at the end. Mean of seeds 0 to 2 of
`python -m finetune.demo`: 54.5 % exactly right, 95.9 % right tool, 98.5 % no call, the form of general answers kept,
where the plain recipe has 43, 100 and 0 % (docs/loop.md). All general prompts would take a sixth of the time.
"""
PLAIN = Recipe(
    ("--epochs", "1", "--tokens-per-step", "2048", "--learning-rate", "5e-4", "--general-prompts", "0", *_GATE)
)
"""As PEFT users train on collected calls: one epoch, eight examples a step, nothing that says when not to call."""

WATCH = (
    *("--adapters", "tools", "--port", "0", "--min-new-traces", "1000000"),
    *("--poll-seconds", "2", "--episode-idle-minutes", "0.05"),
)
"""A sidecar that watches: live traffic comes from clients that ask once, so an episode is over after three seconds."""
