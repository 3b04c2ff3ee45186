"""How the demonstration's rounds are trained: flags of `sterna finetune`, and why they are what they are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recipe:
    flags: tuple[str, ...]


_GATE = ("--gate-max-tokens", "128", "--gate-concurrency", "8", "--canary-share", "0.5")
"""The longest right answer has 106 tokens. At a half of the traffic the watch needs about 150 episodes."""

TOOLS = Recipe(
    (
        *("--epochs", "2.5", "--tokens-per-step", "1024", "--learning-rate", "6e-4"),
        *("--answer-weight", "2", "--argument-key-weight", "1.5", "--structure-weight", "1.5"),
        *("--general-prompts", "90", *_GATE),
    )
)
"""A step is two micro-batches, four examples (195 steps an epoch). A call has 45 tokens and a refusal 12: at equal
weights not calling is a tenth of the loss, and is learned too late. All of the general prompts would take a sixth of
the time. What `python -m finetune.demo` measured with it (seed 0; 194 calls, 148 without): 50 % exactly right, 96 %
right tool, 100 % no call, the form of general answers kept, where the plain recipe has 38, 98 and 0 %. Which third is
held out is another one in each new log, and some are harder. Of its 98 wrong answers 67 have a wrong value and nothing
else, 12 only leave something out, 7 call another tool: values, whose weight is 1, are what is to be learned better.
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
