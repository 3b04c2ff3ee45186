"""A log to learn from and a round small enough for a tiny model: for tests that run the real sidecar."""

import json
import random

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}

SETTINGS = {
    "STERNA_FINETUNE_GENERAL_PROMPTS": "8",
    "STERNA_FINETUNE_MAX_STEPS": "40",
    "STERNA_FINETUNE_TOKENS_PER_STEP": "256",
    "STERNA_FINETUNE_EPOCHS": "20",
    "STERNA_FINETUNE_RANK": "2",
    "STERNA_FINETUNE_CHECKPOINT_EVERY": "2",
    "STERNA_FINETUNE_MIN_CLUSTERS": "20",
    "STERNA_FINETUNE_MIN_STRATUM_CLUSTERS": "5",
    "STERNA_FINETUNE_GATE_MAX_TOKENS": "8",
    "STERNA_FINETUNE_POLL_SECONDS": "1",
}
"""Environment variables of `sterna finetune`."""


def conversations() -> str:
    """JSON lines for `sterna traces import`: 120 questions about different things, a third of them without a call."""
    lines = []
    for number in range(120):
        words = " ".join(f"{random.Random(number).getrandbits(40):x}" for _ in range(6))
        function = {"name": "add", "arguments": json.dumps({"a": number})}
        call = {"role": "assistant", "content": None}
        call |= {"tool_calls": [{"id": f"c{number}", "type": "function", "function": function}]}
        right = {"role": "assistant", "content": "No."} if number % 3 == 0 else call
        messages = [{"role": "user", "content": f"question {number} {words}"}, right]
        lines.append(json.dumps({"messages": messages, "tools": [TOOL]}))
    return "\n".join(lines) + "\n"
