"""Promotions and rollbacks through the admin API while 32 clients stream from `model: "tools"`.

Measures, in one run of one server: requests that failed; requests that mixed versions (an answer's header, fingerprint
and trace must name one version, and its greedy text must be what that version alone gives); seconds from a promotion's
request until new requests get the new version; p99 of the gaps between tokens in the windows around the imports and
swaps (a second longer than either), beside all other times. Every promotion is of a version that was uploaded a moment
before; after every second one comes a rollback. Texts alone are asked for afterwards, one at a time.

usage: python -m benchmarks.hot_swap [--model NAME] [--swaps 6] [--json]
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peft_files import peft_zips
from benchmarks.serve_process import Server, model_path
from benchmarks.streams import Answer, StreamLoad, exchange, gap_figures, is_in, read_answer
from quant.model_file import open_model

STREAMS, MAX_TOKENS, RANK = 32, 48, 16
QUIET_SECONDS = 4.0
"""Between two swaps, so that "usual" is most of the run."""
WINDOW_SECONDS = 1.0
PROMPTS = [f"{kind} {number}: the story of the" for kind in ("Letter", "Chapter", "Report") for number in range(4)]


@dataclass(frozen=True)
class Swap:
    """`begun`: before the upload, if there was one; then the request of the swap itself, and its answer."""

    action: str
    to: str
    begun: float
    asked: float
    done: float


async def swap(server: Server, action: str, to: str, path: str, zip_bytes: bytes | None = None) -> Swap:
    begun = time.perf_counter()
    if zip_bytes is not None:
        assert await asyncio.to_thread(server.import_version, "tools", zip_bytes) == to
    body = {"reason": "benchmark"} | ({"override": True} if action == "promote" else {})
    asked = time.perf_counter()
    await asyncio.to_thread(server.post, path, body)
    return Swap(action, to, begun, asked, time.perf_counter())


async def run_swaps(server: Server, files: list[bytes]) -> list[Swap]:
    """The first version is live when the load starts; here come the others."""
    swaps, live = [], 1
    for number, zip_bytes in enumerate(files, 2):
        await asyncio.sleep(QUIET_SECONDS)
        path = f"/v1/adapters/tools/versions/{number}/promote"
        swaps.append(await swap(server, "promote", f"tools@{number}", path, zip_bytes))
        if number % 2:
            await asyncio.sleep(QUIET_SECONDS)
            swaps.append(await swap(server, "rollback", f"tools@{live}", "/v1/adapters/tools/rollback"))
        else:
            live = number
    await asyncio.sleep(QUIET_SECONDS)
    return swaps


async def run(server: Server, files: list[bytes]) -> tuple[list[Swap], list[Answer], float]:
    def make_body(client: int, turn: int) -> dict[str, object]:
        prompt = PROMPTS[(client + turn) % len(PROMPTS)]
        return {"model": "tools", "prompt": prompt, "max_tokens": MAX_TOKENS - client % 16}  # ends are spread out

    load = StreamLoad(server.url, make_body)
    load.start(STREAMS)
    await asyncio.sleep(QUIET_SECONDS)
    begun = time.perf_counter()
    swaps = await run_swaps(server, files)
    return swaps, await load.stop(), begun


async def texts_alone(server: Server, versions: list[str]) -> dict[tuple[str, str], str]:
    texts = {}
    for version in versions:
        for prompt in PROMPTS:
            body = {"model": version, "prompt": prompt, "max_tokens": MAX_TOKENS}
            texts[version, prompt] = read_answer(*await exchange(server.url, body)).text
    return texts


def traced_versions(server: Server) -> dict[str, tuple[str | None, str]]:
    """Version and status by trace id."""
    found: dict[str, tuple[str | None, str]] = {}
    page = server.get("/v1/traces?limit=1000")
    while True:
        found |= {trace["id"]: (trace["version"], trace["status"]) for trace in page["data"]}
        if page["next_before"] is None:
            return found
        page = server.get(f"/v1/traces?limit=1000&before={page['next_before']}")


def is_mixed(answer: Answer, alone: dict[tuple[str, str], str], traces: dict[str, tuple[str | None, str]]) -> bool:
    """Whether anything speaks of another version than the header does."""
    version, digest = answer.version, answer.headers.get("x-sterna-adapter-digest", "")
    if version is None or not digest or not answer.fingerprint.endswith("-" + digest.removeprefix("sha256:")[:16]):
        return True
    if traces.get(answer.headers["x-sterna-trace-id"]) != (version, "ok"):
        return True
    return not alone[version, answer.body["prompt"]].startswith(answer.text) or not answer.text


def figures(
    swaps: list[Swap],
    answers: list[Answer],
    begun: float,
    alone: dict[tuple[str, str], str],
    traces: dict[str, tuple[str | None, str]],
) -> dict[str, object]:
    good = [answer for answer in answers if answer.error is None]
    num_late = 0  # asked for after a swap was answered (and well before the next), and answered by another version
    for one, until in zip(swaps, [*(later.asked for later in swaps[1:]), float("inf")], strict=True):
        num_late += sum(one.done <= got.start < until - WINDOW_SECONDS and got.version != one.to for got in good)
    around = [(one.begun, one.done + WINDOW_SECONDS) for one in swaps]
    gaps = [gap for answer in good for gap in answer.gaps() if gap[0] >= begun]
    usual = gap_figures([seconds for moment, seconds in gaps if not is_in(moment, around)])
    during = gap_figures([seconds for moment, seconds in gaps if is_in(moment, around)])
    switches = [(one.asked, one.done + WINDOW_SECONDS) for one in swaps]
    switching = gap_figures([seconds for moment, seconds in gaps if is_in(moment, switches)])
    promotions = [one.done - one.asked for one in swaps if one.action == "promote"]
    rollbacks = [one.done - one.asked for one in swaps if one.action == "rollback"]
    return {
        "streams": STREAMS,
        "swaps": len(swaps),
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "mixed": sum(is_mixed(answer, alone, traces) for answer in good),
        "by_old_version_after_swap": num_late,
        "versions_seen": len({answer.version for answer in good}),
        "promotion_max_ms": round(max(promotions) * 1e3),
        "rollback_max_ms": round(max(rollbacks, default=0.0) * 1e3),
        "import_max_ms": round(max(one.asked - one.begun for one in swaps) * 1e3),
        "itl_usual_p50_ms": usual["p50_ms"],
        "itl_usual_p99_ms": usual["p99_ms"],
        "itl_swap_p50_ms": switching["p50_ms"],
        "itl_swap_p99_ms": switching["p99_ms"],
        "itl_import_and_swap_p99_ms": during["p99_ms"],
        "swap_over_usual_p99": round(switching["p99_ms"] / usual["p99_ms"], 2),
        "import_and_swap_over_usual_p99": round(during["p99_ms"] / usual["p99_ms"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=6, help="promotions; rollbacks come besides")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    path = model_path(args.model)
    with closing(open_model(path)) as file:
        files = peft_zips(file.config, count=args.swaps + 1, rank=RANK, strength=0.5)
    with Server(args.model, args.threads) as server:
        server.seconds_to_first_token()
        assert server.import_version("tools", files[0]) == "tools@1"
        server.post("/v1/adapters/tools/versions/1/promote", {"reason": "benchmark", "override": True})
        swaps, answers, begun = asyncio.run(run(server, files[1:]))
        traces = traced_versions(server)
        alone = asyncio.run(texts_alone(server, sorted({answer.version for answer in answers if answer.version})))
    for error in sorted({answer.error for answer in answers if answer.error})[:5]:
        print(f"failed: {error}", file=sys.stderr)
    result = figures(swaps, answers, begun, alone, traces)
    result["different_texts"] = len(set(alone.values()))
    if not args.json:
        print("\n".join(f"{key:<32} {value:>8}" for key, value in result.items()))
    print(json.dumps({"benchmark": "hot_swap", "model": Path(path).name, "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
