"""transformers + PEFT on the steps of benchmarks/train_step.py, as PEFT users run it: batches of 4, padded, bf16.

Reads a file of JSON (model directory, adapter directory, steps of examples), trains every step once (accumulating over
its batches, normalized over the whole step) and prints one line of JSON: seconds and loss of each step, peak memory.

usage: peft_step.py FILE THREADS
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

BATCH = 4
IGNORED = -100


def batches(step: list) -> list[dict[str, torch.Tensor]]:
    result = []
    for start in range(0, len(step), BATCH):
        part = step[start : start + BATCH]
        longest = max(len(ids) for ids, _ in part)
        tokens = torch.zeros(len(part), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
        for row, (ids, first_loss) in enumerate(part):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            labels[row, first_loss : len(ids)] = tokens[row, first_loss : len(ids)]
        result.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return result


def peak_megabytes() -> int:
    """Not ru_maxrss: that begins with what the parent process held."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def main() -> None:
    warnings.filterwarnings("ignore")
    with open(sys.argv[1]) as file:
        task = json.load(file)
    torch.set_num_threads(int(sys.argv[2]))
    base = AutoModelForCausalLM.from_pretrained(task["directory"], dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, task["adapter"], is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task["learning_rate"])
    seconds, losses = [], []
    for step in task["steps"]:
        parts = batches(step)
        start = time.perf_counter()
        normalizer = sum(int((part["labels"] != IGNORED).sum()) for part in parts)
        loss = 0.0
        for part in parts:
            own = model(**part, num_items_in_batch=normalizer).loss
            own.backward()
            loss += own.item()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    peak = peak_megabytes()
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_mb": peak}))


if __name__ == "__main__":
    main()
