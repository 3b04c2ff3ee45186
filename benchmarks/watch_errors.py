"""The watch's error rates, by simulation: false rollbacks, and episodes until harm is found or a canary is promoted.

- False rollbacks of a version without harm, looked at after every episode: equal versions, equal ones in drifting
  traffic, and a version that is worse by exactly what is tolerated in every metric (the hardest case of "no harm").
- Episodes (of both versions together) until rollback, by effect: live with a hold-back of 10 %, canary with 10 %.
- Episodes until a harmless canary is promoted, by its share, and how often a canary with harm at one margin is.
Traffic: episodes of one request with tools, three tools; 60 % call, 5 % tool errors and retries, 2 % malformed,
feedback on one in five with 80 % good, latencies log-normal with sigma 0.5. Not covered: how traces become episodes.

usage: python -m benchmarks.watch_errors [--watches 1000] [--episodes 10000] [--seed 0] [--json]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from finetune.watch.processes import Metric, Processes
from finetune.watch.settings import WatchSettings

MEANS = {
    Metric.CALL_RATE: 0.6,
    Metric.TOOL_ERRORS: 0.05,
    Metric.RETRIES: 0.05,
    Metric.FEEDBACK: 0.8,
    Metric.MALFORMED: 0.02,
}
FEEDBACK_SHARE = 0.2
NUM_TOOLS = 3
NEVER = -1


@dataclass(frozen=True, slots=True)
class Traffic:
    share_new: float = 0.9
    change: Mapping[Metric, float] = field(default_factory=dict)
    """Of the new version's means; of the latency the factor."""
    drift: float = 0.0
    """Every mean rises and falls by this, and latencies by a factor of e^(10 x this), every 600 episodes."""
    only_tool: int | None = None
    """The tool that the change is confined to."""
    settings: WatchSettings = field(default_factory=WatchSettings)

    def draw(self, rng: np.random.Generator, num: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(values [N, metrics], is_new [N], strata [N])"""
        is_new, strata = rng.random(num) < self.share_new, rng.integers(NUM_TOOLS, size=num)
        is_changed = is_new if self.only_tool is None else is_new & (strata == self.only_tool)
        moved = self.drift * math.sin(step * math.tau / 600)
        values = np.empty((num, len(Metric)))
        for metric, mean in MEANS.items():
            values[:, metric] = rng.random(num) < mean + moved + self.change.get(metric, 0.0) * is_changed
        values[rng.random(num) >= FEEDBACK_SHARE, Metric.FEEDBACK] = np.nan
        factor = np.where(is_changed, self.change.get(Metric.LATENCY, 1.0), 1.0)
        values[:, Metric.LATENCY] = rng.lognormal(10 * moved, 0.5, num) * factor
        return values, is_new, strata


def watch(
    traffic: Traffic, num: int, max_episodes: int, seed: int, *, is_canary: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(episode of the rollback, episode at which a canary had shown all) of each watch, NEVER where it did not come.

    A canary that was rolled back is not promoted later.
    """
    settings = traffic.settings
    processes, rng = Processes(settings, num), np.random.default_rng(seed)
    harmed, safe = np.full(num, NEVER), np.full(num, NEVER)
    shares = np.full(num, traffic.share_new)
    for step in tqdm(range(max_episodes), leave=False, disable=None):
        values, is_new, strata = traffic.draw(rng, num, step)
        processes.update(values, is_new, shares, strata)
        is_over = processes.log_harm >= math.log(1 / settings.false_rollback)
        harmed[is_over & (harmed == NEVER)] = step + 1
        is_safe = (processes.best_safety >= math.log(1 / settings.false_promotion)).all(axis=1)
        safe[is_safe & (safe == NEVER) & (harmed == NEVER)] = step + 1
        if (harmed != NEVER).all() or (is_canary and (safe != NEVER).all()):
            break
    return harmed, safe


def at_the_tolerance() -> dict[Metric, float]:
    settings = WatchSettings()
    return {
        Metric.CALL_RATE: settings.call_rate_change[0],
        Metric.TOOL_ERRORS: settings.tool_errors,
        Metric.RETRIES: settings.retries,
        Metric.FEEDBACK: -settings.feedback,
        Metric.MALFORMED: settings.malformed,
        Metric.LATENCY: settings.latency_ratio,
    }


def margins() -> dict[str, dict[Metric, float]]:
    """Harm at the margin of one metric: what a canary must not be promoted with."""
    s = WatchSettings()
    return {
        "call rate": {Metric.CALL_RATE: s.call_rate_change[0] - s.margin_call_rate},
        "tool errors": {Metric.TOOL_ERRORS: s.tool_errors + s.margin_tool_errors},
        "malformed": {Metric.MALFORMED: s.malformed + s.margin_malformed},
        "latency": {Metric.LATENCY: s.latency_ratio * s.margin_latency_ratio},
    }


STRICT = WatchSettings(call_rate_change=(0, 0), tool_errors=0, retries=0, malformed=0, feedback=0, latency_ratio=1.0)

HARMLESS = {
    "equal, hold-back 10 %, nothing tolerated": Traffic(0.9, settings=STRICT),
    "equal, canary 10 %, nothing tolerated": Traffic(0.1, settings=STRICT),
    "equal, hold-back 10 %, drifting traffic, nothing tolerated": Traffic(0.9, drift=0.02, settings=STRICT),
    "equal, hold-back 10 %": Traffic(0.9),
    "worse by the tolerance everywhere, hold-back 10 %": Traffic(0.9, at_the_tolerance()),
    "worse by the tolerance everywhere, canary 10 %": Traffic(0.1, at_the_tolerance()),
}

EFFECTS: dict[str, tuple[dict[Metric, float], int | None]] = {
    "call rate 60 -> 40 %": ({Metric.CALL_RATE: -0.2}, None),
    "call rate 60 -> 20 %": ({Metric.CALL_RATE: -0.4}, None),
    "call rate 60 -> 0 %": ({Metric.CALL_RATE: -0.6}, None),
    "call rate 60 -> 95 %": ({Metric.CALL_RATE: 0.35}, None),
    "call rate 60 -> 0 %, one tool of three": ({Metric.CALL_RATE: -0.6}, 1),
    "tool errors 5 -> 15 %": ({Metric.TOOL_ERRORS: 0.10}, None),
    "tool errors 5 -> 30 %": ({Metric.TOOL_ERRORS: 0.25}, None),
    "retries 5 -> 20 %": ({Metric.RETRIES: 0.15}, None),
    "feedback 80 -> 40 %": ({Metric.FEEDBACK: -0.4}, None),
    "malformed 2 -> 10 %": ({Metric.MALFORMED: 0.08}, None),
    "malformed 2 -> 30 %": ({Metric.MALFORMED: 0.28}, None),
    "latency x 1.6": ({Metric.LATENCY: 1.6}, None),
    "latency x 3": ({Metric.LATENCY: 3.0}, None),
}


def percent(events: np.ndarray) -> float:
    return round(100 * float((events != NEVER).mean()), 2)


def quantiles(events: np.ndarray) -> list[int | None]:
    """Median and 90 % of the episodes it took; None where it did not come often enough."""
    times = np.sort(np.where(events == NEVER, np.iinfo(np.int64).max, events))
    picked = [int(times[math.ceil(q * len(times)) - 1]) for q in (0.5, 0.9)]
    return [None if time == np.iinfo(np.int64).max else time for time in picked]


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"\n{title}\n", "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows])


def _cell(value: object) -> str:
    return "more" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def measure(num: int, max_episodes: int, seed: int, show: Callable[[str], None]) -> dict[str, object]:
    few = max(num // 5, 1)
    harmless = {name: percent(watch(t, num, max_episodes, seed)[0]) for name, t in HARMLESS.items()}
    show(table(f"False rollbacks, {max_episodes:,} episodes", ("version", "rolled back %"), list(harmless.items())))
    found = {}
    for name, (change, tool) in EFFECTS.items():
        times = [watch(Traffic(share, change, only_tool=tool), few, max_episodes, seed)[0] for share in (0.9, 0.1)]
        found[name] = [time for one in times for time in quantiles(one)]
    heads = ("episodes to rollback", "live: median", "90 %", "canary 10 %: median", "90 %")
    show(table("Detection", heads, [(name, *row) for name, row in found.items()]))
    shares = (0.1, 0.2, 0.5)
    promoted = {
        f"{share:.0%}": quantiles(watch(Traffic(share), few, max_episodes, seed, is_canary=True)[1]) for share in shares
    }
    heads = ("canary's share", "episodes to promotion: median", "90 %")
    show(table("A harmless canary", heads, [(name, *row) for name, row in promoted.items()]))
    wrong = {name: percent(watch(Traffic(0.5, c), num, max_episodes // 2, seed)[1]) for name, c in margins().items()}
    show(table("A canary with harm at the margin, share 50 %", ("harm in", "promoted %"), list(wrong.items())))
    numbers = {"watches": num, "episodes": max_episodes}
    return numbers | {"harmless": harmless, "detection": found, "promotion": promoted, "wrong_promotion": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watches", type=int, default=1000, help="simulated; a fifth of it for the times")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    result = measure(args.watches, args.episodes, args.seed, (lambda text: None) if args.json else print)
    sys.stdout.flush()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
