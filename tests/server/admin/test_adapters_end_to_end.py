"""A user with the official client and the command line alone, on a real server: two PEFT adapters, import to rollback.

Imports both, pins requests to one, canaries the other by share of episodes, promotes, rolls back, watches /metrics and
reads the traces; the server is stopped and killed in between and comes back as it was.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from server.config import DEFAULT_MODEL
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]
PROMPT = "Name three animals that live in the sea."
EPISODES = [f"agent run {number}" for number in range(24)]
"""All of them on one side of an even draw: once in eight million runs."""

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def peft_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Saved by PEFT for a model of the default model's shape; B is random too, so that the answers differ."""
    torch = pytest.importorskip("torch", reason="test extra")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=32,  # no adapter touches it
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(LlamaForCausalLM(shape).to(torch.bfloat16), lora)
        folders.append(tmp_path_factory.mktemp("peft") / f"run-{seed}")
        adapted.save_pretrained(folders[-1])
    return folders


class User:
    """Starts and stops one server whose data stays, and knows nothing of its inside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("STERNA_")}
        self._environment |= {"PYTHONPATH": str(ROOT), "STERNA_DATA_DIR": str(folder / "data")}
        self._process: subprocess.Popen[str] | None = None
        self.num_asked: Counter[tuple[str, str]] = Counter()
        """Since the last start, by (arm, version)."""

    def start(self) -> None:
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--kv-memory", "256MiB"]
        with (self._folder / "stderr").open("a") as errors:
            self._process = subprocess.Popen(
                command, cwd=self._folder, env=self._environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self._process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", self._process.stdout.readline())
        if found is None:
            self._end()
            raise AssertionError(f"the server did not start:\n{self.errors()}")
        self._environment["STERNA_URL"] = self.url = found[0]
        self.client = OpenAI(api_key="none needed", base_url=f"{self.url}/v1", max_retries=0)
        self.num_asked.clear()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        code = self._process.wait(PATIENCE_SECONDS)
        self.client.close()
        self._end()
        assert code == (0 if how is signal.SIGTERM else -how)

    def close(self) -> None:
        if self._process is not None:
            self.client.close()
            self._end()

    def _end(self) -> None:
        """Whatever state it is in: nothing is left running or open."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None

    def errors(self) -> str:
        return (self._folder / "stderr").read_text()

    def sterna(self, *arguments: object) -> Any:
        """What a command says with --json."""
        command = [sys.executable, "-m", "server.cli", *map(str, arguments), "--json"]
        done = subprocess.run(command, cwd=self._folder, env=self._environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    def ask(self, model: str, episode: str, arm: str) -> tuple[str, str]:
        """Who answered, and what."""
        response = self.client.chat.completions.with_raw_response.create(
            model=model,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=8,
            temperature=0,
            extra_headers={"X-Sterna-Episode": episode},
        )
        answer = response.parse()
        version = response.headers.get("X-Sterna-Adapter-Version", DEFAULT_MODEL)
        digest = response.headers.get("X-Sterna-Adapter-Digest")
        if digest is not None:
            assert answer.system_fingerprint is not None
            assert answer.system_fingerprint.endswith(digest.removeprefix("sha256:")[:16])
        self.num_asked[arm or ("live" if version == "tools@1" else "canary"), version] += 1
        content = answer.choices[0].message.content
        assert content is not None
        return version, content

    def sides(self) -> dict[str, str]:
        """Who answers each episode of "tools" while tools@1 is live and tools@2 its canary."""
        return {episode: self.ask("tools", episode, "")[0] for episode in EPISODES}

    def metrics(self) -> dict[tuple[str, ...], float]:
        """By name and the values of the labels in the order of the labels' names."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            text = response.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples
        }

    def state(self) -> Any:
        """All that the registry knows, and what this server routes by; not what it has counted."""
        shown = self.sterna("adapters", "show", "tools")
        del shown["serving"]["num_requests"]
        return shown, self.sterna("adapters", "history", "tools")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    user = User(tmp_path)
    yield user
    user.close()


@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
def test_import_pin_canary_promote_roll_back_watch_and_read(user: User, peft_adapters: list[Path]) -> None:
    user.start()

    # Import. Nothing answers for "tools" but the base, and a version only when it is asked for.
    for number, folder in enumerate(peft_adapters, start=1):
        imported = user.sterna("adapters", "import", "tools", folder)
        assert (imported["version"], imported["state"], imported["rank"]) == (f"tools@{number}", "candidate", 8)
    base = user.ask(DEFAULT_MODEL, "first", "base")
    assert user.ask("tools", "first", "base") == base
    pinned = {model: user.ask(model, "first", "pinned") for model in ("tools@1", "tools@2")}
    assert {version for version, _ in pinned.values()} == {"tools@1", "tools@2"}
    texts = dict([base, *pinned.values()])
    assert len(set(texts.values())) == 3, "three models, three answers"
    with pytest.raises(NotFoundError, match="tools@3"):
        user.ask("tools@3", "first", "none")
    assert {"tools", "tools@1", "tools@2"} < {model.id for model in user.client.models.list()}

    # One live, the other its canary: half of the episodes, and an episode stays where it was.
    user.sterna("adapters", "promote", "tools@1", "--override", "--reason", "the first one")
    assert user.ask("tools", "first", "live") == pinned["tools@1"]
    user.sterna("adapters", "canary", "tools@2", "--share", 0.5)
    sides = user.sides()
    assert set(sides.values()) == {"tools@1", "tools@2"}
    assert user.sides() == sides
    for episode in EPISODES[:4]:
        assert user.ask("tools", episode, "") == (sides[episode], texts[sides[episode]])
    check_metrics(user, num_swaps=1)

    # A restart changes nothing.
    state = user.state()
    user.stop()
    user.start()
    assert user.state() == state
    assert user.sides() == sides

    # Promote under a stream: it ends on the version that it began with; who comes next gets the new one.
    begun = next(episode for episode in EPISODES if sides[episode] == "tools@1")
    with user.client.chat.completions.create(
        model="tools",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=200,
        temperature=0,
        stream=True,
        extra_headers={"X-Sterna-Episode": begun},
        extra_body={"ignore_eos": True},
    ) as stream:
        user.num_asked["live", "tools@1"] += 1
        fingerprints = {next(stream).system_fingerprint}
        promoted = user.sterna("adapters", "promote", "tools@2", "--hold-back-share", 0, "--reason", "it won")
        assert promoted["live"] == promoted["serving"]["live"] == "tools@2"
        assert user.ask("tools", begun, "live") == pinned["tools@2"]
        fingerprints |= {chunk.system_fingerprint for chunk in stream}
    assert len(fingerprints) == 1, "one version from the first token to the last"
    assert {user.ask("tools", episode, "live") for episode in EPISODES[:4]} == {pinned["tools@2"]}

    # Killed without a word, the server still knows who is live; and then back.
    state = user.state()
    user.stop(signal.SIGKILL)
    user.start()
    assert user.state() == state
    assert user.ask("tools", "late", "live") == pinned["tools@2"]
    rolled_back = user.sterna("adapters", "rollback", "tools", "--reason", "it called the wrong tool")
    assert (rolled_back["live"], rolled_back["serving"]["live"]) == ("tools@1", "tools@1")
    assert {user.ask("tools", episode, "live") for episode in EPISODES[:4]} == {pinned["tools@1"]}
    check_metrics(user, num_swaps=1)
    check_history(user)
    check_traces(user, sides)
    user.stop()
    assert "Traceback" not in user.errors()


def check_metrics(user: User, *, num_swaps: int) -> None:
    """The server counted what the user did since its start."""
    metrics = user.metrics()
    routed = {key[1:]: count for key, count in metrics.items() if key[0] == "sterna_routed_requests_total"}
    assert routed == user.num_asked
    for version in {version for _, version in user.num_asked}:
        asked = sum(count for (_, name), count in user.num_asked.items() if name == version)
        assert metrics["sterna_e2e_request_latency_seconds_count", version] == asked
        assert metrics["sterna_time_to_first_token_seconds_count", version] == asked
    assert metrics["sterna_adapter_swap_seconds_count", "switched"] == num_swaps
    assert metrics["sterna_adapter_swap_seconds_count", "failed"] == 0
    assert metrics[("sterna_traces_dropped_total",)] == 0


def check_history(user: User) -> None:
    rows = user.sterna("adapters", "history", "tools")
    assert [(row["version"], row["action"], row["to_state"]) for row in reversed(rows)] == [
        ("tools@1", "import", "candidate"),
        ("tools@2", "import", "candidate"),
        ("tools@1", "override", "live"),
        ("tools@2", "canary", "canary"),
        ("tools@1", "supersede", "retired"),
        ("tools@2", "promote", "live"),
        ("tools@2", "rollback", "retired"),
        ("tools@1", "restore", "live"),
    ]
    assert {row["reason"] for row in rows[:2]} == {"it called the wrong tool"}


def check_traces(user: User, sides: dict[str, str]) -> None:
    """Each answer is there, with the version that gave it and its episode; whatever happened to the server since."""
    digests = {row["version"]: row["digest"] for row in user.sterna("adapters", "show", "tools")["versions"]}
    for episode in EPISODES[-2:]:  # asked by `sides` alone (`begun` is the first on its side): three times, one version
        traces = user.sterna("traces", "list", "--episode-id", episode)["data"]
        assert len(traces) == 3
        for one in traces:
            assert (one["version"], one["adapter"], one["status"]) == (sides[episode], "tools", "ok")
        trace = user.sterna("traces", "show", traces[0]["id"])
        assert trace["request"]["messages"] == [{"role": "user", "content": PROMPT}]
        assert trace["details"]["version_digest"] == digests[sides[episode]]
