"""A hundred registered adapter versions, twenty of them asked for by name under a skewed (Zipf) load.

Measures, on one machine, with places for more versions than are in use (24) and again with memory for fewer (12):
requests that failed; how often versions were loaded; resident memory beside the budget. And, with 24 places and 16
streams running on warm versions: the time to first token of a version that is not loaded, less that of the same version
asked again ("cold costs"); p99 of the gaps between the other streams' tokens in the second after each such request,
beside all other times. The versions' files are in the page cache.

usage: python -m benchmarks.many_adapters [--model NAME] [--probes 24] [--json]
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path

from benchmarks.peft_files import peft_zips
from benchmarks.serve_process import Server, model_path
from benchmarks.streams import Answer, StreamLoad, exchange, gap_figures, is_in, read_answer
from loadtests.sse_client import WORDS
from quant.model_file import open_model

NUM_VERSIONS, NUM_USED = 100, 20
STREAMS, MAX_TOKENS, RANK = 16, 48, 8
SECONDS = 15.0
PROBE_EVERY_SECONDS = 1.5
MANY_PLACES, FEW_PLACES = 24, 12
KV_MEMORY = "128MiB"
"""Small, because memory is measured and the cache grows until it is full."""
METRICS = {
    "loads": "sterna_adapter_loads_total", "evictions": "sterna_adapter_evictions_total",
    "held_mb": "sterna_adapter_held_bytes",
}  # fmt: skip


def body_of(version: int, seed: int, max_tokens: int = MAX_TOKENS) -> dict[str, object]:
    """A prompt of its own, so that no prefix cache helps."""
    draw = random.Random(seed)
    prompt = " ".join(draw.choice(WORDS) for _ in range(6))
    return {"model": f"tools@{version}", "prompt": prompt, "max_tokens": max_tokens}


async def zipf_load(server: Server) -> list[Answer]:
    weights = [1 / rank for rank in range(1, NUM_USED + 1)]

    def make_body(client: int, turn: int) -> dict[str, object]:
        seed = 1000 * client + turn
        version = random.Random(seed).choices(range(1, NUM_USED + 1), weights)[0]
        return body_of(version, seed, MAX_TOKENS - client)

    load = StreamLoad(server.url, make_body)
    load.start(STREAMS)
    await asyncio.sleep(SECONDS)
    return await load.stop()


async def probe_cold(server: Server, num_probes: int) -> tuple[list[Answer], list[Answer], list[Answer]]:
    """(cold, the same again, the other streams')."""
    load = StreamLoad(server.url, lambda client, turn: body_of(1 + client % 4, 10**6 + 1000 * client + turn))
    load.start(STREAMS)
    await asyncio.sleep(2 * PROBE_EVERY_SECONDS)
    cold, warm = [], []
    for version in range(NUM_USED + 1, NUM_USED + 1 + num_probes):
        for answers, seed in ((cold, version), (warm, -version)):
            answers.append(read_answer(*await exchange(server.url, body_of(version, seed, 4))))
            await asyncio.sleep(PROBE_EVERY_SECONDS)
    return cold, warm, await load.stop()


async def settle(server: Server) -> None:
    """Touch all of the KV cache, so that what grows from here on is the adapters' memory."""
    model = server.base_name()
    for turn in range(6):
        bodies = [{**body_of(1, -1000 * turn - seed, 200), "model": model} for seed in range(1, STREAMS + 1)]
        await asyncio.gather(*(exchange(server.url, body) for body in bodies))


def metrics_of(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(server.url + "/metrics") as response:
        text = response.read().decode()
    found = {}
    for key, name in METRICS.items():
        match = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert match is not None, f"{name} is not in /metrics"
        found[key] = float(match[1])
    return found


def run_zipf(server: Server, places: int, empty_mb: int, version_mb: float) -> dict[str, object]:
    answers = asyncio.run(zipf_load(server))
    wrong = [one for one in answers if one.error is not None or one.version != one.body["model"]]
    seen = metrics_of(server)
    return {
        f"requests_{places}": len(answers),
        f"failed_{places}": len(wrong),
        f"tok_s_{places}": round(sum(one.num_tokens for one in answers) / SECONDS),
        f"ttft_p50_ms_{places}": round(statistics.median(one.ttft for one in answers if one.times) * 1e3),
        f"itl_p99_ms_{places}": gap_figures([gap for one in answers for _, gap in one.gaps()])["p99_ms"],
        f"loads_{places}": int(seen["loads"]),
        f"evictions_{places}": int(seen["evictions"]),
        f"held_mb_{places}": round(seen["held_mb"] / 1e6),
        f"budget_mb_{places}": round(places * version_mb),
        f"rss_growth_mb_{places}": server.resident_mb() - empty_mb,
    }


def run_probes(server: Server, num_probes: int) -> dict[str, object]:
    cold, warm, others = asyncio.run(probe_cold(server, num_probes))
    failed = [one for one in (*cold, *warm, *others) if one.error is not None]
    costs = [first.ttft - again.ttft for first, again in zip(cold, warm, strict=True) if first.times and again.times]
    loading = [(one.start, one.start + 1.0) for one in cold]
    begun = cold[0].start
    gaps = [gap for one in others for gap in one.gaps() if gap[0] >= begun]
    usual = gap_figures([seconds for moment, seconds in gaps if not is_in(moment, loading)])
    during = gap_figures([seconds for moment, seconds in gaps if is_in(moment, loading)])
    return {
        "probes": len(cold),
        "probes_failed": len(failed),
        "warm_ttft_p50_ms": round(statistics.median(one.ttft for one in warm) * 1e3),
        "cold_ttft_p50_ms": round(statistics.median(one.ttft for one in cold) * 1e3),
        "cold_costs_p50_ms": round(statistics.median(costs) * 1e3),
        "cold_costs_max_ms": round(max(costs) * 1e3),
        "others_itl_usual_p50_ms": usual["p50_ms"],
        "others_itl_usual_p99_ms": usual["p99_ms"],
        "others_itl_cold_p50_ms": during["p50_ms"],
        "others_itl_cold_p99_ms": during["p99_ms"],
        "cold_over_usual_p99": round(during["p99_ms"] / usual["p99_ms"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--probes", type=int, default=24)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    path = model_path(args.model)
    with tempfile.TemporaryDirectory(prefix="sterna-bench-") as folder:
        data_dir = Path(folder)
        flags = ("--kv-memory", KV_MEMORY, "--max-loras", str(MANY_PLACES))
        with Server(args.model, args.threads, *flags, data_dir=data_dir) as server:
            server.seconds_to_first_token()
            start = time.perf_counter()
            with closing(open_model(path)) as file:
                for number, one in enumerate(peft_zips(file.config, count=NUM_VERSIONS, rank=RANK, strength=0.5), 1):
                    assert server.import_version("tools", one) == f"tools@{number}"
            result: dict[str, object] = {"import_ms_each": round((time.perf_counter() - start) * 1e3 / NUM_VERSIONS)}
            version_mb = server.get("/v1/adapters/tools/versions/1")["memory_bytes"] / 1e6
            asyncio.run(settle(server))
            result |= run_zipf(server, MANY_PLACES, server.resident_mb(), version_mb)
            result |= run_probes(server, args.probes)
        flags = ("--kv-memory", KV_MEMORY, "--adapter-memory", str(round(FEW_PLACES * version_mb * 1e6)))
        with Server(args.model, args.threads, *flags, data_dir=data_dir) as server:
            server.seconds_to_first_token()
            assert len(server.get("/v1/adapters/tools")["versions"]) == NUM_VERSIONS
            asyncio.run(settle(server))
            result |= run_zipf(server, FEW_PLACES, server.resident_mb(), version_mb)
    if not args.json:
        print("\n".join(f"{key:<28} {value:>8}" for key, value in result.items()))
    about = {"versions": NUM_VERSIONS, "used": NUM_USED, "rank": RANK, "version_mb": round(version_mb, 1)}
    print(
        json.dumps({"benchmark": "many_adapters", "model": Path(path).name, "threads": args.threads, **about, **result})
    )


if __name__ == "__main__":
    main()
