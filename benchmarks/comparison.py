"""The figures of a comparison as medians, ratios and tables; benchmarks/compare.py collects them.

A ratio is the median of the rounds' ratios, each of two runs that followed each other. A cell "3.1x (3.0x)" is a ratio
and, in brackets, what it must reach at least. Measures nothing itself.
"""

import statistics
from dataclasses import dataclass

from benchmarks import report, targets
from benchmarks.cases import KEYS, Cases
from benchmarks.limits import Limits
from benchmarks.models import Work
from benchmarks.peers.ik_llamacpp import MEASURED

LORA_KEYS = ("loras_none", "loras_unused", "loras_mixed")


@dataclass(frozen=True)
class Comparison:
    rounds: list[dict[tuple[str, str], dict]]
    """A round's figures by (model, engine)."""
    works: dict[str, Work]
    """Of the models, in their order."""
    limits: list[Limits]
    """One a round."""
    streams: list[dict[int, tuple[float, float]]]
    """A round's (Sterna, vLLM) over HTTP by number of streams; empty when vLLM was not asked for."""
    cases: Cases

    def engines(self) -> list[str]:
        return list(dict.fromkeys(engine for _, engine in self.rounds[0]))

    def median(self, model: str, engine: str, key: str) -> float:
        return statistics.median(float(figures[model, engine][key]) for figures in self.rounds)

    def ratio(self, model: str, engine: str, other: str, key: str) -> float:
        pairs = [(figures[model, engine], figures[model, other]) for figures in self.rounds]
        return statistics.median(float(ours[key]) / float(theirs[key]) for ours, theirs in pairs)

    def share(self, model: str, key: str, other: str) -> float:
        """Of Sterna's own figure `other` that `key` is."""
        figures = [one[model, "Sterna"] for one in self.rounds]
        return statistics.median(float(one[key]) / float(one[other]) for one in figures)

    def of_vnni(self, model: str, key: str) -> float:
        work = self.works[model]
        macs = work.layer_macs + (0 if key.endswith("prefill") else work.head_macs)
        rates = [float(one[model, "Sterna"][key]) for one in self.rounds]
        return statistics.median(r * macs / 1e9 / m.dot_gmacs for r, m in zip(rates, self.limits, strict=True))

    def of_memory(self, model: str) -> float:
        work = self.works[model]
        num_bytes = work.layer_bytes + work.head_bytes
        rates = [float(one[model, "Sterna"]["decode_b1"]) for one in self.rounds]
        return statistics.median(r * num_bytes / 1e9 / m.memory_gb_s for r, m in zip(rates, self.limits, strict=True))


def _times(value: float, target: float | None, mark: str = "") -> str:
    return f"{mark}{value:.2f}x" + (f" ({target:.2f}x)" if target else "")


def _percent(value: float, target: float | None = None) -> str:
    return f"{value:.0%}" + (f" ({target:.0%})" if target else "")


def _ratio_row(c: Comparison, model: str, ours: str, other: str, wanted: dict[str, float]) -> list[str]:
    cells = []
    for key in KEYS:
        target = wanted.get(key)
        if key == "long_prefill" and wanted:
            target = c.ratio(model, ours, other, "prefill")  # no lower than at 512 tokens
        cells.append(_times(c.ratio(model, ours, other, key), target))
    return [f"ratio to {other}", *cells]


def _estimated_row(c: Comparison, model: str) -> list[str]:
    """To ik_llama.cpp, from its ratio to llama.cpp in another run on another day."""
    known, wanted = MEASURED[model], targets.IK_LLAMA_CPP[model]
    cells = [
        _times(c.ratio(model, "Sterna", "llama.cpp", key) / known[key], wanted[key], "est. ") if key in known else "–"
        for key in KEYS
    ]
    return ["ratio to ik_llama.cpp, estimated", *cells]


def speeds(c: Comparison) -> str:
    rows = [["tokens per second", *c.cases.headings()]]
    engines = c.engines()
    for model in c.works:
        for engine in engines:
            rows.append([f"{model}: {engine}", *(f"{c.median(model, engine, key):,.0f}" for key in KEYS)])
        if "llama.cpp" in engines:
            rows.append(_ratio_row(c, model, "Sterna", "llama.cpp", targets.LLAMA_CPP.get(model, {})))
        if "ik_llama.cpp" in engines:
            rows.append(_ratio_row(c, model, "Sterna", "ik_llama.cpp", targets.IK_LLAMA_CPP.get(model, {})))
        elif "llama.cpp" in engines and model in MEASURED:
            rows.append(_estimated_row(c, model))
        if "llama.cpp, AVX2" in engines:
            rows.append(_ratio_row(c, model, "Sterna, AVX2", "llama.cpp, AVX2", targets.AVX2_LLAMA_CPP))
    return report.table(rows)


def shares(c: Comparison) -> str:
    """Of this machine's limits in the same run, and of the short prompt's rate at the long one."""
    kept = f"prefill {c.cases.long_prefill:,} of {c.cases.prefill:,}"
    rows = [["Sterna", kept, "prefill of int8 peak", "decode b32 of int8 peak", "decode b1 of memory bandwidth"]]
    for model in c.works:
        wanted = targets.BATCH_32_OF_VNNI if model in targets.LLAMA_CPP else None
        rows.append(
            [
                model,
                _percent(c.share(model, "long_prefill", "prefill"), targets.LONG_PREFILL_KEPT.get(model)),
                _percent(c.of_vnni(model, "prefill")),
                _percent(c.of_vnni(model, "decode_b32"), wanted),
                _percent(c.of_memory(model), targets.DECODE_OF_BANDWIDTH.get(model)),
            ]
        )
    return report.table(rows)


def machine(c: Comparison) -> str:
    """Medians of the rounds' limits, in words."""
    peak, memory = (statistics.median(getattr(one, name) for one in c.limits) for name in ("dot_gmacs", "memory_gb_s"))
    about, first = report.cpu(), c.limits[0]
    clock = ", each engine's CPU time" if c.cases.own_clock else ""
    return (
        f"{about['cpu']} ({about['flags']}), {first.threads} threads, {first.isa}: int8 peak {peak:,.0f} GMAC/s, "
        f"memory {memory:.1f} GB/s, measured in the same run; commit {report.commit()}; {len(c.rounds)} rounds{clock}."
    )


def loras(c: Comparison) -> str:
    """Decode at batch 32 with versions of rank 16, beside none loaded."""
    rows = [["batch 32", "none loaded", "loaded, unused", "mixed in the batch", "kept, unused", "kept, mixed"]]
    for model in c.works:
        if LORA_KEYS[0] in c.rounds[0][model, "Sterna"]:
            none, unused, mixed = LORA_KEYS
            rows.append(
                [
                    model,
                    *(f"{c.median(model, 'Sterna', key):,.0f}" for key in LORA_KEYS),
                    _percent(c.share(model, unused, none), targets.LORA_UNUSED_KEPT),
                    _percent(c.share(model, mixed, none), targets.LORA_KEPT),
                ]
            )
    return report.table(rows) if len(rows) > 1 else ""


def streams(c: Comparison) -> str:
    if not c.streams:
        return ""
    rows = [["streams over HTTP, tokens per second", "Sterna", "vLLM CPU, bf16", "ratio"]]
    for number, target in targets.VLLM_STREAMS.items():
        pairs = [one[number] for one in c.streams]
        ours, theirs = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(our / their for our, their in pairs)
        rows.append([str(number), f"{ours:,.0f}", f"{theirs:,.0f}", _times(ratio, target)])
    return report.table(rows)


def text(c: Comparison) -> str:
    return "\n\n".join(part for part in (speeds(c), shares(c), loras(c), streams(c), machine(c)) if part)


def figures(c: Comparison) -> dict[str, object]:
    """For the line of JSON: medians and ratios, rounded."""
    by_engine = {
        model: {e: {k: round(c.median(model, e, k), 2) for k in _numbers(c.rounds[0][model, e])} for e in c.engines()}
        for model in c.works
    }
    peers = [e for e in c.engines() if not e.startswith("Sterna")]
    ratios = {
        model: {p: {k: round(c.ratio(model, _ours(p), p, k), 3) for k in KEYS} for p in peers} for model in c.works
    }
    by_streams = {
        str(n): [round(statistics.median(one[n][side] for one in c.streams), 1) for side in (0, 1)]
        for n in (c.streams[0] if c.streams else ())
    }
    return {"models": by_engine, "ratios": ratios, "http_streams": by_streams}


def _numbers(figures: dict) -> list[str]:
    return [key for key, value in figures.items() if isinstance(value, int | float)]


def _ours(peer: str) -> str:
    return "Sterna, AVX2" if peer.endswith("AVX2") else "Sterna"
