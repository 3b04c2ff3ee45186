"""Where a step's time goes: milliseconds by op for each model and kind of step, beside what the machine's limits allow.

The core takes the time between its ops on the thread that drives it (server/engine/core/profile.h), barriers included.
Beside the sum stand two floors from limits measured in the same run: multiply-adds of the weights over the int8 peak,
and bytes of the tensors that the step reads over memory bandwidth; no step can be below the larger of the two, except
that weights which stay in the cache between steps need not come from memory. `rest` is what the call takes beside its
ops. Writes a picture (SVG), prints a table and one line of JSON.

usage: python -m benchmarks.profile_step [--models ...] [--threads 2] [--quick] [--svg docs/step.svg] [--markdown FILE]
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import limits, models, report
from benchmarks.engine_speed import add_loras
from finetune import svg
from quant.model_file import open_model
from server.engine.bench import EngineTimer
from server.engine.weights import load_core

DEFAULTS = (models.DEFAULT, "nano", "2b")
PROMPT = 512
NUM_LORAS = 8
_COLOURS = {
    "qkv": "#1f77b4", "out": "#6baed6", "gate_up": "#08519c", "down": "#3182bd", "head": "#756bb1",
    "attention": "#d95f02", "norm": "#1b9e77", "activation": "#66c2a4", "rope": "#a6d854", "embed": "#b3b3b3",
    "sample": "#e7298a", "lora": "#e6ab02", "rest": "#666666",
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    model: str
    step: str
    """Such as "decode b8"."""
    milliseconds: dict[str, float]
    """By op, "rest" included, of the fastest of the steps: what else ran on the machine is in the others."""
    compute_floor: float
    memory_floor: float

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


def profile(model: str, threads: int, isa: str, limit: limits.Limits, *, steps: int, own_clock: bool) -> list[Profile]:
    clock = time.thread_time if own_clock else time.perf_counter
    path = models.path_of(model)
    work = models.work_of(path)
    file = open_model(path)
    core = load_core(
        file,
        isa=isa,
        num_threads=threads,
        num_blocks=512,
        max_num_seqs=32,
        max_batch_tokens=PROMPT,
        max_loras=NUM_LORAS,
    )
    with_loras = model == models.DEFAULT
    if with_loras:
        add_loras(core, file.config, NUM_LORAS)
    timer = EngineTimer(core, 16)
    mixed = np.arange(32, dtype=np.int32) % NUM_LORAS

    def floors(rows: int, sampled: int) -> tuple[float, float]:
        macs = rows * work.layer_macs + sampled * work.head_macs
        return macs / limit.dot_gmacs / 1e6, (work.layer_bytes + work.head_bytes) / limit.memory_gb_s / 1e6

    def gather(step: str, run: Callable[[], object], rows: int, sampled: int) -> Profile:
        gathered: list[dict[str, float]] = []
        for _ in range(steps):
            core.profile(True, own_clock)
            start = clock()
            run()
            seconds = clock() - start
            ops = core.profile(False)
            gathered.append({**ops, "rest": seconds - sum(ops.values())})
        fastest = min(gathered, key=lambda one: sum(one.values()))
        return Profile(model, step, {op: s * 1e3 for op, s in fastest.items() if s > 0}, *floors(rows, sampled))

    whole = EngineTimer(core, 512)
    whole.prefill(PROMPT)
    profiles = [gather(f"prefill {PROMPT}", lambda: whole.prefill(PROMPT), PROMPT, 1)]
    for batch in (1, 8, 32):
        decode = OneStep(timer, batch)
        profiles.append(gather(f"decode b{batch}", decode, batch, batch))
    if with_loras:
        decode = OneStep(timer, 32, mixed)
        profiles.append(gather(f"decode b32, {NUM_LORAS} LoRA versions", decode, 32, 32))
    file.close()
    return profiles


class OneStep:
    """The next decode step of sequences that decode together, in a context of at most 200 tokens."""

    def __init__(self, timer: EngineTimer, batch: int, lora_slots: np.ndarray | None = None) -> None:
        self._timer, self._batch, self._lora_slots = timer, batch, lora_slots
        self._tokens = timer.start(batch)
        self._starts = np.arange(batch + 1, dtype=np.int32)
        self._position = 6

    def __call__(self) -> None:
        positions = np.full(self._batch, self._position, np.int32)
        self._tokens = self._timer.step(self._tokens, self._starts, positions, self._starts[:-1], self._lora_slots)
        self._position = min(self._position + 1, 200)


def table(profiles: list[Profile]) -> str:
    ops = [op for op in _COLOURS if any(op in p.milliseconds for p in profiles)]
    rows = [["milliseconds a step", *ops, "sum", "compute floor", "memory floor"]]
    for p in profiles:
        figures = [p.milliseconds.get(op, 0.0) for op in ops]
        floors = [p.total, p.compute_floor, p.memory_floor]
        rows.append([f"{p.model}: {p.step}", *(f"{ms:.2f}" for ms in [*figures, *floors])])
    return report.table(rows)


def picture(profiles: list[Profile], title: str) -> str:
    """A bar a step, each as long as its time: op by op; under it the floors, as parts of that time."""
    left, width, row = 310, 800, 34
    parts = [svg.text(10, 18, title, size=13)]
    x = 10.0
    for op, colour in _COLOURS.items():
        if any(op in p.milliseconds for p in profiles):
            parts += [svg.box(x, 28, 10, 10, colour), svg.text(x + 13, 37, op, size=11)]
            x += 22 + 6.5 * len(op)
    y = 54.0
    for p in profiles:
        parts.append(svg.text(left - 8, y + 12, f"{p.model}: {p.step}", anchor="end", size=11))
        parts.append(svg.text(left + width + 6, y + 12, f"{p.total:.2f} ms", size=11))
        x = float(left)
        for op, colour in _COLOURS.items():
            share = p.milliseconds.get(op, 0.0) / p.total
            if share < 0.0005:
                continue
            parts.append(svg.box(x, y, share * width, 16, colour))
            if share > 0.06:
                parts.append(
                    svg.text(x + share * width / 2, y + 12, f"{share:.0%}", anchor="middle", size=10, colour="white")
                )
            x += share * width
        for height, floor, colour in ((17, p.compute_floor, "#222"), (21, p.memory_floor, "#999")):
            parts.append(svg.box(left, y + height, min(floor / p.total, 1.0) * width, 3, colour))
        y += row
    parts.append(svg.box(left, y + 2, 20, 3, "#222"))
    parts.append(svg.text(left + 24, y + 8, "multiply-adds / int8 peak", size=11))
    parts.append(svg.box(left + 200, y + 2, 20, 3, "#999"))
    parts.append(svg.text(left + 224, y + 8, "bytes of the weights / memory bandwidth", size=11))
    return svg.page(left + width + 80, int(y) + 20, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULTS), help="nano, 2b, catalogue names or GGUF files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--quick", action="store_true", help="three steps of each kind: no figures to quote")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="one thread, timed by its own clock: for a machine that does other things too",
    )
    parser.add_argument("--svg", type=Path, help="where to write the picture")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--markdown", type=Path, help="a document whose section `profile` gets the table")
    args = parser.parse_args()
    args.threads = 1 if args.busy else args.threads
    limit = limits.measure(args.threads, args.isa)
    profiles = []
    for model in args.models:
        print(f"profiling {model}", file=sys.stderr)
        profiles += profile(model, args.threads, args.isa, limit, steps=3 if args.quick else 25, own_clock=args.busy)
    about = (
        f"{report.cpu()['cpu']}, {limit.threads} threads, {limit.isa}: int8 peak {limit.dot_gmacs:,.0f} GMAC/s, memory "
        f"{limit.memory_gb_s:.1f} GB/s{', CPU time' if args.busy else ''}; commit {report.commit()}"
    )
    if args.svg:
        args.svg.write_text(picture(profiles, about), "utf-8")
    figures = {"threads": args.threads, "limits": asdict(limit), "profiles": [asdict(p) for p in profiles]}
    report.finish(
        f"{table(profiles)}\n\n{about}.", figures, json_only=args.json, markdown=args.markdown, section="profile"
    )


if __name__ == "__main__":
    main()
