"""Training steps beside transformers + PEFT: same machine, run, data, adapter at the start, optimizer and steps.

Three kinds of steps on the default model (LoRA rank 16 on seven projections, bf16): `full`, 4 x 256 random tokens with
loss on each; `traces`, steps of a round on the demonstration's calls and refusals, loss on the answer; `agent`, 8
questions that share a prompt of many tools. The peer pads batches of 4; we pack. Tokens are real example tokens: no
padding, a shared prefix once per example. Both run in processes of their own, in turn, `--rounds` times; ratios are of
one round, the median is reported. "bound": 4 x parameters FLOP per token that is laid out (the head's where there is
loss) at the bf16 GEMM rate that this run measures. Not covered: what is learned in the end (the demonstration), GPUs.

usage: python -m benchmarks.train_step [--model NAME|PATH] [--kinds full,traces,agent] [--rounds 3] [--threads 2]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train_data import KINDS, make_steps, write_directory
from finetune.dataset.packing import pack
from finetune.model.allocator import keep_freed_memory
from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.model.peft import export_peft, import_peft
from finetune.packed import Example, Packed
from finetune.rounds.adapter import NUM_SIDES, Adapter, Keyed, side_by_side
from finetune.train.adamw import AdamW
from quant.model_types import ModelConfig
from server.config import DEFAULT_MODEL, Settings
from server.machine import peak_bytes
from server.models.catalog import resolve_model

SPEC = LoraSpec(rank=16, alpha=32.0)
LEARNING_RATE = 1e-4
MAX_ROWS = 2048
"""Computed at once, as in a round; more where a longer prompt and what follows it need them."""
TARGETS = {"full": 1.6, "traces": 3.0, "agent": 5.0}
MEMORY_TARGET = 0.30
WARM_UP = 1


def micro_batches(step: list) -> list[Packed]:
    """As a round has them (finetune/rounds/steps.py)."""
    examples = []
    for number, (ids, first_loss) in enumerate(step):
        weights = np.zeros(len(ids), np.float32)
        weights[first_loss:] = 1
        examples.append(Example(str(number), np.array(ids, np.int32), weights, str(number)))
    rows = sum(len(one.token_ids) for one in examples)
    half = min(MAX_ROWS, rows) // NUM_SIDES  # so that one has another beside it
    short, long = ([one for one in examples if (len(one.token_ids) > half) == is_long] for is_long in (False, True))
    packed = pack(short, half, seed=0, epoch=0)
    return packed + (pack(long, max(len(one.token_ids) for one in long) + half, seed=0, epoch=0) if long else [])


def ours(task: dict[str, Any], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = TrainModel.open(task["model"], SPEC)
    import_peft(model, task["adapter"])
    adapter = Adapter(model)
    # The values that the peer's torch.optim.AdamW has by default.
    optimizer = AdamW(list(model.parameters().values()), LEARNING_RATE, (0.9, 0.999), weight_decay=0.01)
    seconds, losses = [], []
    for step in task["steps"]:
        parts = [Keyed(part, number) for number, part in enumerate(micro_batches(step))]
        start = time.perf_counter()
        batches = side_by_side(parts, MAX_ROWS)
        normalizer = sum(adapter.weight_of(batch) for batch in batches)
        loss = sum(adapter.backward(batch, normalizer) for batch in batches)
        optimizer.step()
        for parameter in model.parameters().values():
            parameter.grad = None
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    peak = peak_bytes() >> 20
    return {"seconds": seconds, "losses": losses, "peak_mb": peak, "gemm_gflops": gemm_rate()}


def gemm_rate() -> float:
    """GFLOP/s of the layers' largest product, the best of some."""
    x, w = torch.randn(1024, 576).bfloat16(), torch.randn(3072, 576).bfloat16()
    best = min(_timed(lambda: torch.mm(x, w.t())) for _ in range(30))
    return 2 * 1024 * 576 * 3072 / best / 1e9


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def floor_flops(config: ModelConfig, step: list) -> float:
    """4 x parameters for every row that is laid out, the head only for rows with loss."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = 3 * config.hidden_size * config.intermediate_size
    layers = config.num_layers * (config.hidden_size * (2 * queries + 2 * keys) + mlp)
    head = config.vocab_size * config.hidden_size
    parts = micro_batches(step)
    rows, with_loss = sum(len(p.token_ids) for p in parts), sum(len(np.unique(p.loss_rows)) for p in parts)
    return 4.0 * (layers * rows + head * with_loss)


def run_worker(command: list[str | Path]) -> dict[str, Any]:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(command[1]).name} failed: {done.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(kind: str, path: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = TrainModel.open(path, SPEC)
    export_peft(model, folder / "adapter")
    write_directory(model, folder / "directory")
    config = model.config
    model.close()
    steps = make_steps(kind, path, args.cache, num_steps=WARM_UP + args.steps)
    task = {
        "learning_rate": LEARNING_RATE,
        "model": str(path),
        "directory": str(folder / "directory"),
        "adapter": str(folder / "adapter"),
    }
    file = folder / "task.json"
    file.write_text(json.dumps(task | {"steps": steps}))
    peer = Path(__file__).parent / "peers" / "peft_step.py"
    own_command = [sys.executable, "-m", "benchmarks.train_step", "--worker", str(file), "--threads", str(args.threads)]
    runs = []
    for number in range(args.rounds):
        print(f"{kind}: round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        runs.append((run_worker(own_command), run_worker([sys.executable, peer, file, str(args.threads)])))
    timed = steps[WARM_UP:]
    tokens = sum(len(ids) for step in timed for ids, _ in step)
    flops = sum(floor_flops(config, step) for step in timed)
    return summary(kind, runs, tokens, flops)


def summary(kind: str, runs: list[tuple[dict, dict]], tokens: int, flops: float) -> dict[str, Any]:
    def rate(run: dict[str, Any]) -> float:
        return tokens / sum(run["seconds"][WARM_UP:])

    median = statistics.median
    bounds = [tokens / (flops / 1e9 / own["gemm_gflops"]) for own, _ in runs]
    differences = [abs(a - b) for own, peer in runs[:1] for a, b in zip(own["losses"], peer["losses"], strict=True)]
    return {
        "kind": kind,
        "tok_s": round(median(rate(own) for own, _ in runs), 1),
        "peft_tok_s": round(median(rate(peer) for _, peer in runs), 1),
        "ratio": round(median(rate(own) / rate(peer) for own, peer in runs), 2),
        "ratios": [round(rate(own) / rate(peer), 2) for own, peer in runs],
        "bound_tok_s": round(median(bounds), 1),
        "share_of_bound": round(median(rate(own) / bound for (own, _), bound in zip(runs, bounds, strict=True)), 3),
        "peak_mb": max(own["peak_mb"] for own, _ in runs),
        "peft_peak_mb": min(peer["peak_mb"] for _, peer in runs),
        "losses": [round(loss, 4) for loss in runs[0][0]["losses"]],
        "peft_losses": [round(loss, 4) for loss in runs[0][1]["losses"]],
        "largest_loss_difference": round(max(differences), 4),
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = [("", "tok/s", "PEFT", "ratio", "target", "of bound", "peak MB", "PEFT", "share")]
    for r in results:
        share = r["peak_mb"] / r["peft_peak_mb"]
        cells = (f"{r['tok_s']:,.0f}", f"{r['peft_tok_s']:,.0f}", f"{r['ratio']:.2f}x", f"{TARGETS[r['kind']]}x")
        memory = (f"{r['peak_mb']:,}", f"{r['peft_peak_mb']:,}", f"{share:.0%}")
        rows.append((r["kind"], *cells, f"{r['share_of_bound']:.0%}", *memory))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="catalogue name or path of a GGUF of the llama family")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"separated by commas, of {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "sterna", help="for the questions' wheel"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.worker:
        print(json.dumps(ours(json.loads(args.worker.read_text()), args.threads)))
        return
    path = resolve_model(args.model, Settings().cache_dir).path
    results = []
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(kind, path, Path(folder), args))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))
    print(f"targets: ratios as given, and at most {MEMORY_TARGET:.0%} of the peer's memory in `full`")
    print(json.dumps({"model": path.name, "threads": args.threads, "rounds": args.rounds, "results": results}))


if __name__ == "__main__":
    main()
