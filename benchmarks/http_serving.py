"""`sterna serve` as its users meet it: start, memory, what HTTP costs at idle, and 32 streams beside the bare engine.

Measures, in one run on one machine: seconds from process start to the first token of the first answer (warm file
cache); resident memory before and after load; time to first token of a short prompt over HTTP and in the engine alone;
tokens per second of 32 streams over HTTP with the load client on the same cores, against `sterna bench` at batch 32;
inter-token latency p99 over its median. Prompts are distinct, so the prefix cache helps only with the
template; speculation is off.

usage: python -m benchmarks.http_serving [--model NAME] [--rounds 3] [--json]
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.serve_process import STERNA, Server, model_path
from loadtests import sse_client
from quant.model_file import open_model
from server.engine.engine import Engine
from server.engine.params import SamplingParams
from server.engine.weights import load_core
from server.text.tokenizer import build_tokenizer

STREAMS, MAX_TOKENS = 32, 128
PROBES = 25


def load(server: Server, *, streams: int, max_tokens: int, seed: int) -> dict:
    options = argparse.Namespace(
        url=server.url,
        endpoint="completions",
        model=None,
        streams=streams,
        max_tokens=max_tokens,
        prompt_words=6,
        prompts_seed=seed,
        timeout_seconds=300.0,
        purpose="user",  # as traffic is served, metrics included
        api_key=None,
    )
    return sse_client.summarize(asyncio.run(sse_client.run_load(options)))


def engine_ttft_ms(path: str, threads: int) -> float:
    """Median time from submit to the first token at the event loop, engine alone, the prompts of `load`."""
    file = open_model(path)
    tokenizer = build_tokenizer(file.tokenizer, file.config.vocab_size)
    core = load_core(file, isa="auto", num_threads=threads, num_blocks=256, max_num_seqs=4, max_batch_tokens=512)
    engine = Engine(core, max_model_len=1024, max_waiting=4, eog_token_ids=tokenizer.eog_token_ids)

    async def measure() -> list[float]:
        engine.start(asyncio.get_running_loop())
        seconds = []
        for number in range(PROBES):
            options = argparse.Namespace(prompt_words=6, max_tokens=1, endpoint="completions")
            _, body = sse_client.make_body(options, "", (1000 + number) * 10_000)
            ids = tokenizer.encode(str(body["prompt"]), add_special=True, parse_special=True)
            start = time.perf_counter()
            stream = engine.submit(ids, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
            async for _ in stream:
                seconds.append(time.perf_counter() - start)
                break
            await stream.aclose()
            await asyncio.sleep(0.02)  # idle between two, as over HTTP
        engine.stop()
        return seconds

    return statistics.median(asyncio.run(measure())) * 1e3


def run_round(model: str, path: str, threads: int, number: int) -> dict[str, float]:
    bench = subprocess.run(
        [STERNA, "bench", "--model", path, "--threads", str(threads), "--json"], stdout=subprocess.PIPE, check=True
    )
    engine_tok_s = json.loads(bench.stdout)["decode_b32_tok_s"]
    with Server(model, threads, "--max-draft-tokens", "0") as server:
        start = server.seconds_to_first_token()
        idle_mb = server.resident_mb()
        probes = [load(server, streams=1, max_tokens=1, seed=1000 + i)["ttft_p50_ms"] for i in range(PROBES)]
        load(server, streams=STREAMS, max_tokens=16, seed=900 + number)
        loads = [load(server, streams=STREAMS, max_tokens=MAX_TOKENS, seed=10 * number + i) for i in range(3)]
        loaded_mb = server.resident_mb()
    if any(one["errors"] for one in loads):
        raise SystemExit("requests failed under load")
    middle = sorted(loads, key=lambda one: one["tok_s"])[1]
    return {
        "start_seconds": start,
        "idle_rss_mb": idle_mb,
        "loaded_rss_mb": loaded_mb,
        "http_ttft_ms": statistics.median(probes),
        "engine_ttft_ms": engine_ttft_ms(path, threads),
        "engine_b32_tok_s": engine_tok_s,
        "http_32_tok_s": middle["tok_s"],
        "share_of_engine": middle["tok_s"] / engine_tok_s,
        "itl_p50_ms": middle["itl_p50_ms"],
        "itl_p99_ms": middle["itl_p99_ms"],
        "itl_p99_over_p50": middle["itl_p99_ms"] / middle["itl_p50_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    path = model_path(args.model)
    rounds = []
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        rounds.append(run_round(args.model, path, args.threads, number))
    result = {key: round(statistics.median(r[key] for r in rounds), 2) for key in rounds[0]}
    result["http_adds_ms"] = round(result["http_ttft_ms"] - result["engine_ttft_ms"], 2)
    if not args.json:
        print("\n".join(f"{key:<18} {value:>10}" for key, value in result.items()))
    print(json.dumps({"model": Path(path).name, "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
