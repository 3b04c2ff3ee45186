"""Each matrix kernel alone: GOPS, GB/s of weights, and shares of this machine's limits, by ISA, shape, rows and
threads.

An operation is half a multiply-add. Weights are random, in a model's own type and shape, an adapter's in the one that
the core packs it in (server/engine/core/lora.cpp); activations are quantized once, outside the timing. 1 row is a
decode step's GEMV, 8 and 32 rows are batches, 128 rows are what the engine hands a kernel at a time in prefill (their
activations stay in L2). With several threads each has its own part of the outputs, as in the engine, but there are no
barriers: those are in benchmarks/profile_step.py, and so is attention. Limits are measured in the same run
(benchmarks/limits.py): int8 products of this ISA, and reads from where these weights fit: L2, L3 or memory.

usage: python -m benchmarks.kernels [--isas avx512 ...] [--threads 1 2] [--quick] [--json] [--markdown FILE]
"""

import argparse
import functools
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import _sterna
from benchmarks import limits, report, targets
from quant.formats import BLOCK, GGMLType

ROWS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Shape:
    """A matrix of a model: outputs x inputs."""

    model: str
    name: str
    type: GGMLType
    out: int
    cols: int

    @property
    def num_bytes(self) -> int:
        elements, size = BLOCK[self.type]
        return self.out * self.cols // elements * size


SHAPES = (
    Shape("smollm2-135m", "gate+up", GGMLType.Q4_1, 3072, 576),
    Shape("smollm2-135m", "down", GGMLType.Q4_1, 576, 1536),
    Shape("smollm2-135m", "head", GGMLType.Q8_0, 49152, 576),
    Shape("nano", "gate+up", GGMLType.TQ2_0, 4096, 768),
    Shape("nano", "down", GGMLType.TQ2_0, 768, 2048),
    Shape("2b", "qkv", GGMLType.TQ2_0, 3840, 2560),
    Shape("2b", "gate", GGMLType.TQ2_0, 6912, 2560),
    Shape("2b", "down", GGMLType.TQ2_0, 2560, 6912),
    Shape("LoRA rank 16", "A of gate", GGMLType.Q8_0, 16, 2560),
)
QUICK_SHAPES = tuple(shape for shape in SHAPES if (shape.model, shape.name) in {("2b", "gate"), ("nano", "down")})


@dataclass(frozen=True)
class Result:
    shape: Shape
    isa: str
    threads: int
    gops: dict[int, float]
    """By rows, as the next."""
    of_dot: dict[int, float]
    """Share of the int8 peak."""
    gb_s: float
    """Of weights with one row, in the size that the file has."""
    level: str
    """Where these are read from: L2, L3 or memory; empty: partly from one, partly from another."""
    of_read: float
    """Share of what can be read from there."""


def random_matrix(type_: GGMLType, out: int, cols: int) -> "_sterna.Matrix":
    """Every code occurs, scales are equal; speed does not depend on them."""
    rng = np.random.default_rng(0)
    elements, size = BLOCK[type_]
    blocks = rng.integers(0, 256, (out * cols // elements, size), np.uint8)
    scale = np.array([0.01], np.float16).view(np.uint8)
    if type_ == GGMLType.TQ2_0:
        low, high = blocks & 0x55, (blocks >> 1) & 0x55
        blocks = low | ((high & ~low) << 1)
        blocks[:, 64:] = scale
    else:
        blocks[:, : {GGMLType.Q8_0: 2, GGMLType.Q4_1: 4}[type_]] = np.tile(scale, 1 if type_ == GGMLType.Q8_0 else 2)
    return _sterna.Matrix(int(type_), blocks.reshape(-1), out, cols)


def group_of(rows: int, isa: str) -> int:
    """Rows that the kernels take together, as the core chooses them."""
    return 1 if rows == 1 else 8 if rows > 4 and isa == "avx512" else 4


def time_matmul(shape: Shape, isa: str, threads: int, rows: int, repeats: int) -> float:
    """Seconds of one product, the slowest thread's."""
    part = max(shape.out // threads // 16 * 16, 16)
    x = np.random.default_rng(1).standard_normal((rows, shape.cols), np.float32)
    group = group_of(rows, isa)
    # A matrix for each thread, and so many of them that a repeated product finds its weights where a step would.
    matrices = [random_matrix(shape.type, part, shape.cols) for _ in range(threads)]
    times = limits.rounds_for(lambda n: matrices[0].matmul(x, isa, group, n))
    jobs = [functools.partial(matrix.matmul, x, isa, group, times) for matrix in matrices]
    return limits.seconds_together(jobs, repeats) / times * (shape.out / (part * threads))


def cache_bytes(level: int) -> int:
    """Of the first CPU; 0 when the system does not say."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            found = re.fullmatch(r"(\d+)K", (index / "size").read_text().strip())
            if found and (index / "type").read_text().strip() != "Instruction":
                return int(found[1]) << 10
    return 0


def read_limit(num_bytes: int, limit: limits.Limits) -> tuple[str, float]:
    """Where weights of this size are read from when a product is repeated, and how fast that is at most."""
    if num_bytes / limit.threads < cache_bytes(2) * 0.75:
        return "L2", limit.l2_gb_s
    if num_bytes < cache_bytes(3) * 0.75:
        return "L3", limit.l3_gb_s
    if num_bytes > cache_bytes(3) * 4:
        return "memory", limit.memory_gb_s
    return "", 0.0  # partly from L3


def measure(shape: Shape, limit: limits.Limits, repeats: int) -> Result:
    seconds = {rows: time_matmul(shape, limit.isa, limit.threads, rows, repeats) for rows in ROWS}
    gmacs = {rows: rows * shape.out * shape.cols / one / 1e9 for rows, one in seconds.items()}
    gb_s = shape.num_bytes / seconds[1] / 1e9
    level, most = read_limit(shape.num_bytes, limit)
    return Result(
        shape,
        limit.isa,
        limit.threads,
        {rows: 2 * one for rows, one in gmacs.items()},
        {rows: one / limit.dot_gmacs for rows, one in gmacs.items()},
        gb_s,
        level,
        gb_s / most if level else 0.0,
    )


def target(result: Result) -> str:
    """What must be reached, in words; empty: nothing."""
    shape, threads = result.shape, result.threads
    if result.isa != "avx512" or shape.type != GGMLType.TQ2_0:
        return ""
    gemv = f"1 row: {targets.GEMV_GOPS[threads]:.0f} GOPS" if threads in targets.GEMV_GOPS else ""
    gemm = f"{ROWS[-1]} rows: {targets.GEMM_OF_VNNI:.0%}" if shape.model == "2b" else ""
    return "; ".join(part for part in (gemv, gemm) if part)


def table(results: list[Result]) -> str:
    counts = [f"{rows} row{'s' * (rows > 1)}" for rows in ROWS]
    rows = [["GOPS (of int8 peak)", "kernel", *counts, "weights read at 1 row", "target"]]
    for r in results:
        has_peak = r.isa != "scalar"  # its probe is no peak: compilers vectorize it as they like
        cells = [f"{r.gops[n]:,.0f}" + (f" ({r.of_dot[n]:.0%})" if has_peak else "") for n in ROWS]
        reads = f"{r.gb_s:.1f} GB/s" + (f", {r.of_read:.0%} of {r.level}" if r.level else "")
        name = f"{r.shape.model} {r.shape.name}, {r.shape.type.name} {r.shape.out}x{r.shape.cols}"
        rows.append([name, f"{r.isa}, {r.threads}T", *cells, reads, target(r)])
    return report.table(rows)


def limits_table(all_limits: list[limits.Limits]) -> str:
    rows = [["limits", "int8 GOPS", "L2 GB/s", "L3 GB/s", "memory GB/s"]]
    for one in all_limits:
        reads = (one.l2_gb_s, one.l3_gb_s, one.memory_gb_s)
        rows.append([f"{one.isa}, {one.threads}T", f"{2 * one.dot_gmacs:,.0f}", *(f"{value:.1f}" for value in reads)])
    return report.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    isas = _sterna.available_isas()
    parser.add_argument("--isas", nargs="+", choices=isas, default=[isa for isa in isas if isa != "scalar"] or isas)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="two shapes, few repeats: no figures to quote")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--markdown", type=Path, help="a document whose section `kernels` gets the tables")
    args = parser.parse_args()
    repeats = 5 if args.quick else 25
    results, measured = [], []
    for isa in args.isas:
        for threads in args.threads:
            measured.append(limits.measure(threads, isa, repeats=repeats))
            shapes = QUICK_SHAPES if args.quick else SHAPES
            results += [measure(shape, measured[-1], repeats) for shape in shapes]
    figures = {"limits": [asdict(one) for one in measured], "kernels": [asdict(one) for one in results]}
    text = f"{limits_table(measured)}\n\n{table(results)}\n\n{report.cpu()['cpu']}; commit {report.commit()}."
    report.finish(text, figures, json_only=args.json, markdown=args.markdown, section="kernels")


if __name__ == "__main__":
    main()
