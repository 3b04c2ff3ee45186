"""Training steps from scratch beside transformers: a llama of the same size, equal batches, AdamW included.

Five ways: ours ternary (products in bf16, shadows and optimizer in float32), ours ternary in float32, ours with plain
bf16 linear layers (nothing is rounded: what fake quantization costs), transformers in float32 and in bf16 (weights and
optimizer too, which ours never are). Each runs in a process of its own, in turn, `--rounds` times; ratios are of one
round, the median is reported. Targets: ours ternary at least 1.5 times as fast as transformers' float32, on par with
its bf16, and at least 0.7 times as fast as plain bf16 layers. Not covered: what is learned, Muon, GPUs.

usage: python -m benchmarks.qat_step [--hidden 512] [--layers 8] [--batch 8] [--length 256] [--rounds 3] [--threads 2]
    [--cpu-time]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.train_step import run_worker
from finetune.model.allocator import keep_freed_memory
from finetune.packed import Packed, Segment
from finetune.qat.model import QatModel
from finetune.qat.shape import Shape
from finetune.train.optimizer import NamedOptimizer
from finetune.train.settings import TrainSettings
from server.machine import peak_bytes

VOCAB = 4096
WARM_UP = 1
OURS = {
    "ternary": (torch.bfloat16, True),
    "ternary float32": (torch.float32, True),
    "plain": (torch.bfloat16, False),
}
THEIRS = {"transformers float32": torch.float32, "transformers bfloat16": torch.bfloat16}
RATIOS = {  # how many times as fast the ternary model is as ...: at least
    "transformers float32": 1.5,
    "transformers bfloat16": 1.0,
    "plain": 0.7,
}


def make_shape(args: argparse.Namespace) -> Shape:
    return Shape(
        vocab_size=VOCAB,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_layers=args.layers,
        num_heads=args.hidden // 64,
        num_kv_heads=max(1, args.hidden // 128),
    )


def token_ids(args: argparse.Namespace, step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, VOCAB, (args.batch, args.length)).astype(np.int32)


def packed(ids: np.ndarray) -> Packed:
    """Every token of a row predicts the next."""
    batch, length = ids.shape
    rows = np.arange(batch * length, dtype=np.int32).reshape(batch, length)[:, :-1].reshape(-1)
    return Packed(
        token_ids=ids.reshape(-1),
        positions=np.tile(np.arange(length, dtype=np.int32), batch),
        segments=tuple(Segment(i * length, (i + 1) * length, -1) for i in range(batch)),
        loss_rows=rows,
        loss_targets=ids[:, 1:].reshape(-1),
        loss_weights=np.ones(len(rows), np.float32),
        loss_kl=np.zeros(len(rows), bool),
        num_examples=batch,
        num_real_tokens=batch * length,
    )


def ours(args: argparse.Namespace) -> list[float]:
    dtype, is_quantized = OURS[args.worker]
    model = QatModel(make_shape(args), dtype=dtype, is_quantized=is_quantized)
    optimizer = NamedOptimizer(model.parameters(), TrainSettings(num_steps=1, weight_decay=0.1))
    clock, seconds = _clock(args), []
    for step in range(args.steps + WARM_UP):
        one = packed(token_ids(args, step))
        start = clock()
        model.loss(one, float(len(one.loss_rows))).total.backward()
        optimizer.step(1e-3)
        optimizer.clear_gradients()
        seconds.append(clock() - start)
    return seconds


def theirs(args: argparse.Namespace) -> list[float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = make_shape(args)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(THEIRS[args.worker]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    clock, seconds = _clock(args), []
    for step in range(args.steps + WARM_UP):
        ids = torch.from_numpy(token_ids(args, step).astype(np.int64))
        start = clock()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - start)
    return seconds


def _clock(args: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if args.cpu_time else time.perf_counter


def worker(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    seconds = ours(args) if args.worker in OURS else theirs(args)
    print(json.dumps({"seconds": statistics.median(seconds[WARM_UP:]), "peak_mb": peak_bytes() >> 20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"hidden": 512, "layers": 8, "batch": 8, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"steps": 4, "rounds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the CPU: where others compute, 1 thread")
    parser.add_argument("--worker", choices=[*OURS, *THEIRS])
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    ways = [*OURS, *THEIRS]
    numbers = ("hidden", "layers", "batch", "length", "steps", "threads")
    options = [part for name in numbers for part in (f"--{name}", str(getattr(args, name)))]
    options += ["--cpu-time"] if args.cpu_time else []
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(args.rounds):
        command = [sys.executable, "-m", "benchmarks.qat_step", *options]
        rounds.append({way: run_worker([*command, "--worker", way]) for way in ways})
    tokens = args.batch * args.length
    result: dict[str, Any] = {"parameters": make_shape(args).num_parameters, "tokens": tokens, "ways": {}, "ratios": {}}
    for way in ways:
        seconds = statistics.median(one[way]["seconds"] for one in rounds)
        peak = max(one[way]["peak_mb"] for one in rounds)
        result["ways"][way] = {"seconds": round(seconds, 4), "peak_mb": peak}
        print(f"{way:<22} {seconds:8.3f} s a step  {tokens / seconds:9,.0f} tok/s  {peak:6,} MB at the peak")
    for way, target in RATIOS.items():
        ratio = statistics.median(one[way]["seconds"] / one["ternary"]["seconds"] for one in rounds)
        result["ratios"][way] = round(ratio, 3)
        print(f"ternary is {ratio:.2f} times as fast as {way} (target {target})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
