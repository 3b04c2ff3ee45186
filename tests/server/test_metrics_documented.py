"""Every metric that the documentation and the alert rules name exists, and every one that exists is documented."""

import re
from pathlib import Path

from server.adapters.residency import ResidencyStats
from server.adapters.router import Arm
from server.adapters.service import ServiceStats
from server.engine.stats import Counters
from server.metrics import Metrics
from server.traces.log_stats import CommitClock, LogStats
from tests.server.exposition import samples

ROOT = Path(__file__).resolve().parents[2]


def exposed_names() -> set[str]:
    """As they stand in the text: `_total`, and a histogram's parts."""
    metrics = Metrics()
    engine = Counters().snapshot(
        num_running=0, num_waiting=0, num_blocks_used=0, num_blocks_cached=0, num_blocks_total=1, num_adapters=0
    )
    metrics.watch_engine(lambda: engine)
    metrics.watch_log(lambda: LogStats(0, 0, 0, None, CommitClock().snapshot()))
    metrics.watch_adapters(lambda: ServiceStats(0, {}, 0, ()), lambda: ResidencyStats(0, 0, 0, 0, 0, 0), lambda: ())
    metrics.start_request("chat", "m").finish("stop", num_prompt_tokens=1)
    metrics.start_request("chat", "m", purpose="evaluation").finish("stop", num_prompt_tokens=1)
    metrics.count_route("m", Arm.BASE)
    metrics.count_answer("m", True, 1, 0)
    metrics.count_feedback("m", "thumbs", 1.0)
    metrics.count_response("chat", 200)
    return {name.removeprefix("sterna_") for name, _ in samples(metrics) if name.startswith("sterna_")}


def test_the_alert_rules_ask_for_metrics_that_exist() -> None:
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    named = set(re.findall(r"\bsterna_(\w+)", rules))
    assert len(named) > 5
    assert named <= exposed_names()


def test_the_table_of_metrics_is_complete() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    lines = [line for line in page[page.index("| metric | what |") :].split("\n\n")[0].splitlines() if "`" in line]
    documented = {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    exposed = exposed_names()
    parts = ("_bucket", "_count", "_sum", "_created")
    whole = {name for name in exposed if not name.endswith(parts)}
    whole |= {name.removesuffix("_bucket") for name in exposed if name.endswith("_bucket")}
    assert whole <= documented
    assert documented <= whole | exposed
