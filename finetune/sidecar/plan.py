"""The memory that training will take, by part, and the longest context that fits: what `sterna finetune plan` shows.

Predicted, nothing is loaded. Not here: the prediction (finetune/model/memory.py). Imports torch.
"""

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.config import FinetuneSettings
from finetune.model.memory import ADAMW_SLOTS, LONGEST, MUON_SLOTS, longest_context, plan_memory
from finetune.model.model import ModelOptions
from finetune.rounds.training import lora_spec
from quant.model_file import open_model
from server.machine import available_memory_bytes, peak_bytes

CONTEXTS = (1024, 4096, 32_768, LONGEST)


def plan_body(model: Path, own: FinetuneSettings, budget_bytes: int | None) -> dict[str, Any]:
    """`budget_bytes`: of the device; None takes what is free here. Raises ModelFileError."""
    budget = available_memory_bytes() if budget_bytes is None else budget_bytes
    spec, options = lora_spec(own), ModelOptions(upcast=own.upcast, checkpointing=own.checkpointing)
    slots = ADAMW_SLOTS if own.optimizer == "adamw" else MUON_SLOTS
    common = {"optimizer_slots": slots, "process_bytes": peak_bytes()}
    with closing(open_model(model)) as file:
        rows = []
        for num_tokens in sorted({own.micro_batch_tokens, *CONTEXTS}):
            plan = plan_memory(file, spec, options, num_tokens, **common)
            rows.append({"num_tokens": num_tokens, **asdict(plan), "total": plan.total, "fits": plan.total <= budget})
        longest = []
        for checkpointing in (False, True):
            found = longest_context(file, spec, replace(options, checkpointing=checkpointing), budget, **common)
            longest.append({"checkpointing": checkpointing, "num_tokens": found.num_tokens, "limit": found.limit})
    return {"object": "memory.plan", "model": str(model), "budget_bytes": budget, "plans": rows, "longest": longest}
