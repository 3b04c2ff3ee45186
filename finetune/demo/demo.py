"""The demonstration from end to end: traffic, a round of the plain recipe, the loop's round, the swap, the picture.

1. `sterna serve` with the default model; the questions are asked of two adapters that have no version yet.
2. Known answers are posted. `plain` is told of the calls only, as who collects tool calls to train on would have them.
3. A round of `plain`: the gate rejects what it broke. The round of `tools`: the gate lets it begin as a canary.
4. The sidecar's watch moves it to live under live traffic.
Everything is left in one folder: report.md, picture.svg, result.json, the rounds' pages, logs, the data directory.
"""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.dataset.bfcl import Question, fetch, read_questions
from finetune.dataset.prompts import CHAT, read_prompts
from finetune.dataset.source import last_seq, read_traces
from finetune.demo.live import Traffic, live_traffic, watch_until
from finetune.demo.picture import picture
from finetune.demo.recipe import PLAIN, TOOLS, WATCH, Recipe
from finetune.demo.results import missed, regression, rows_of, table
from finetune.demo.servers import DemoError, run, running
from finetune.demo.traffic import (
    Asked,
    call_requests,
    mixed,
    no_call_requests,
    post_known_answers,
    send,
    with_base_answers,
)
from finetune.gate.decision import Decision
from finetune.serving.api import ServerApi
from finetune.serving.http import Http
from server.config import Remote
from server.storage.database import open_database

SWAP_LIMIT_SECONDS = 600.0
"""A canary needs about 150 episodes; four clients ask as many in a minute or two."""
SWAP_AFTER_SECONDS = 15.0
"""Traffic after the swap, for the picture."""


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: Path
    model: str
    seed: int = 0
    questions: Sequence[Question] | None = None
    """Instead of the leaderboard's: a test has its own."""
    misfit_share: float = 0.35
    """Of the questions that are also asked with tools that do not fit: with ordinary chat, three of ten requests."""
    num_chats: int | None = None
    """None: all that we have."""
    tools: Recipe = TOOLS
    plain: Recipe | None = PLAIN
    """None: the plain recipe is not tried."""


@dataclass
class Demo:
    options: Options
    url: str
    http: Http
    api: ServerApi
    environment: Mapping[str, str]
    seconds: dict[str, float]
    """By stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

    # -- traffic ------------------------------------------------------------------------------------------------------

    def teach(self, questions: Sequence[Question]) -> list[Asked]:
        """Sends all traffic and feedback; returns the requests of the training side, calls and others mixed."""
        for adapter in ("tools", "plain"):
            self.api.create_adapter(adapter, "the demonstration")
        calls = call_requests(questions)
        of_plain = {one.id for one in questions if self.options.plain and one.set == "simple_python"}
        ids = self._send({"tools": {one.name for one in calls}, "plain": of_plain}, calls)
        untouched = self._held_out("tools")
        held_out = {name for name, trace in ids["tools"].items() if trace in untouched}
        prompts = read_prompts(CHAT)[: self.options.num_chats]
        others = no_call_requests(questions, held_out, prompts, share=self.options.misfit_share, seed=self.options.seed)
        others = with_base_answers(self.api, others)
        fitting = of_plain & held_out
        strangers = {one.name for one in others if one.name.removeprefix("misfit_") in fitting}
        strangers |= {one.name for one in others if one.name.startswith("chat_") and of_plain}
        more = self._send({"tools": {one.name for one in others}, "plain": strangers}, others)
        post_known_answers(self.http, [*calls, *others], ids["tools"] | more["tools"])
        untouched = self._held_out("plain")
        told = [one for one in others if more["plain"].get(one.name) in untouched]
        told += [one for one in calls if one.name in ids["plain"]]
        post_known_answers(self.http, told, ids["plain"] | more["plain"])
        untouched = self._held_out("tools")
        traces = ids["tools"] | more["tools"]
        return mixed([one for one in (*calls, *others) if traces[one.name] not in untouched])

    def _send(self, adapters: Mapping[str, Collection[str]], requests: Sequence[Asked]) -> dict[str, dict[str, str]]:
        with tqdm(total=len(requests), desc="  requests", disable=None, leave=False) as bar:
            return send(self.http, adapters, requests, lambda: bar.update() and None)

    def _held_out(self, adapter: str) -> set[str]:
        """Ids of the traces that the server has drawn to stay untouched."""
        database = open_database(f"sqlite:///{(self.options.folder / 'data' / 'sterna.db').resolve()}")
        try:
            return {one.id for one in read_traces(database, adapter, "held_out", until_seq=last_seq(database))}
        finally:
            database.close()

    # -- rounds -------------------------------------------------------------------------------------------------------

    def round(self, adapter: str, recipe: Recipe) -> dict[str, Any]:
        """One round in the foreground; leaves its page. Raises DemoError."""
        flags = [*recipe.flags, "--seed", str(self.options.seed), "--url", self.url, "--model", self.options.model]
        found: dict[str, Any] = json.loads(run(["finetune", "run", adapter, *flags, "--json"], self.environment))
        page = run(["finetune", "report", found["id"]], self.environment)
        (self.options.folder / f"round-{found['id']}.md").write_text(page)
        print(f"  {found['id']}: {found['result']}: {found['reason']}", flush=True)
        return found

    def swap(self, requests: Sequence[Asked]) -> tuple[Traffic, bool]:
        """The canary under live traffic until the watch has moved it to live (False: it did not)."""
        log = self.options.folder / "sidecar.log"
        flags = ["--url", self.url, "--model", self.options.model, *WATCH]
        with (
            running(["finetune", *flags], log, self.environment),
            live_traffic(self.url, "tools", requests) as traffic,
        ):
            is_live = watch_until(traffic, self._state, lambda state: "live" in state, limit_seconds=SWAP_LIMIT_SECONDS)
            watch_until(traffic, self._state, lambda state: False, limit_seconds=traffic.now() + SWAP_AFTER_SECONDS)
        return traffic, is_live

    def _state(self) -> str:
        adapter = self.api.adapter("tools")
        roles = [f"{adapter[role]} {role}" for role in ("canary", "live") if adapter[role] is not None]
        return ", ".join(roles) or "the base answers"


def run_demo(options: Options) -> dict[str, Any]:
    """The result, which is also in the folder. Raises DemoError and FinetuneError."""
    options.folder.mkdir(parents=True, exist_ok=True)
    data = options.folder / "data"
    if data.exists():
        raise DemoError(f"{data} holds an earlier demonstration: remove it, or name another folder")
    environment = {"STERNA_DATA_DIR": str(data.resolve())}
    questions = options.questions or read_questions(fetch(options.folder.parent / "bfcl"))
    serve = ["serve", "--model", options.model, "--port", "0"]
    with running(serve, options.folder / "server.log", environment) as url:
        http = Http(Remote(url, None), patience_seconds=60)
        try:
            demo = Demo(options, url, http, ServerApi(http), environment, {})
            result = _all_stages(demo, questions)
        finally:
            http.close()
    (options.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _all_stages(demo: Demo, questions: Sequence[Question]) -> dict[str, Any]:
    options, plain, traffic, is_live = demo.options, None, Traffic(), False
    with demo.stage("traffic and known answers"):
        requests = demo.teach(questions)
    if options.plain:
        with demo.stage("a round of the plain recipe"):
            plain = demo.round("plain", options.plain)
    with demo.stage("the loop's round"):
        tools = demo.round("tools", options.tools)
    if tools["result"] == "canary":
        with demo.stage("the swap under traffic"):
            traffic, is_live = demo.swap(requests)
    return _told(demo, tools, plain, traffic, is_live=is_live)


def _told(
    demo: Demo, tools: Mapping[str, Any], plain: Mapping[str, Any] | None, traffic: Traffic, *, is_live: bool
) -> dict[str, Any]:
    """Writes report and picture."""
    decision = _decision(tools)
    rows = rows_of(decision, None if plain is None else _decision(plain))
    kept, lost = regression(decision)
    result = {
        "seed": demo.options.seed,
        "result": tools["result"],
        "is_live": is_live,
        "plain_result": None if plain is None else plain["result"],
        "missed": [*missed(rows), *lost],
        "seconds": demo.seconds,
        "rows": [asdict(row) for row in rows],
        "rounds": [one for one in (plain, tools) if one is not None],
        "traffic": traffic.as_json(),
    }
    folder = demo.options.folder
    drawn = picture(rows, tools["facts"]["train"]["losses"], traffic.answered, traffic.events)
    (folder / "picture.svg").write_text(drawn)
    (folder / "report.md").write_text(_report(result, f"{table(rows)}\n{kept}", traffic))
    return result


def _decision(round: Mapping[str, Any]) -> Decision:
    """Raises DemoError where the gate has nothing to show."""
    if round["decision"] is None or not round["decision"]["scores"]:
        raise DemoError(f"the gate of {round['id']} measured nothing: {round['reason']}")
    return Decision.from_json(json.dumps(round["decision"]))


def _report(result: Mapping[str, Any], scores: str, traffic: Traffic) -> str:
    told = [f"- {one['id']}: **{one['result'].replace('_', ' ')}**: {one['reason']}" for one in result["rounds"]]
    minutes = sum(result["seconds"].values()) / 60
    swap = f"{len(traffic.answered)} requests during the swap, {len(traffic.faults)} failed; "
    swap += "the watch made the canary live." if result["is_live"] else "the canary did not go live."
    parts = ["# What the loop learned", "![before and after](picture.svg)", scores, "\n".join(told), swap]
    parts.append(f"{minutes:.1f} minutes in all: " + ", ".join(f"{k} {v:.0f} s" for k, v in result["seconds"].items()))
    parts += [f"Missed: {one}" for one in result["missed"]]
    return "\n\n".join(parts) + "\n"
