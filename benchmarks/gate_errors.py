"""The gate's error rates, by simulation: how often it promotes what is not better, and how often what is.

- False promotions over 20 consecutive rounds of equal candidates (A/A), each on fresh clusters, also without spending
  the level over the history; another schedule, LORD++ (Ramdas et al. 2017), for false and true promotions.
- The same for a candidate that has memorized every held-out answer of earlier rounds and is the best of 20 on them,
  when a third of the questions come again; beside it a gate that lets old clusters count.
- Trades of rare no-calls for calls that leave balanced accuracy where it was.
- Power by clusters, gain and number of the decision; the second route with lower loss at equal accuracy.
Not covered: the guards, which only lower these rates (in the memorizing candidate they are on).

usage: python -m benchmarks.gate_errors [--histories 2000] [--seed 0] [--json]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from finetune.gate.decision import Outcome, decide, second_route
from finetune.gate.results import Judged, Label, PairedTrace, RegressionScore
from finetune.gate.spending import BUDGET_PER_ROUTE, History
from finetune.gate.statistics import Pairs, primary_test

NUM_ROUNDS = 20
DELTA = 0.05
LEVEL_ONE = BUDGET_PER_ROUTE * History().share_of_budget
KEPT = (RegressionScore(10.0, 0.9, 50), RegressionScore(10.0, 0.9, 50))


@dataclass(frozen=True, slots=True)
class World:
    """What one round's traces are drawn from."""

    num_clusters: int = 150
    share_call: float = 2 / 3
    better: tuple[float, float] = (0.075, 0.075)
    """Of traces that expect a call, and none: right by the candidate only; 15 % discordant pairs in all."""
    worse: tuple[float, float] = (0.075, 0.075)
    max_traces: int = 1
    """A cluster has 1 to this many, which go the same way if they differ."""
    loss_gain: float = 0.0
    """Mean fall of the loss, in standard deviations of a trace's difference; the differences are skewed."""

    def draw(self, rng: np.random.Generator) -> Pairs:
        num_call = round(self.share_call * self.num_clusters)
        sizes = rng.integers(1, self.max_traces + 1, self.num_clusters)
        clusters = np.repeat(np.arange(self.num_clusters), sizes)
        of_cluster = np.arange(self.num_clusters) < num_call
        better, worse = np.where(of_cluster, *self.better), np.where(of_cluster, *self.worse)
        chance = rng.random(self.num_clusters)
        way = np.where(chance < better, 1, np.where(chance < better + worse, -1, 0))[clusters]
        right = way * (rng.random(len(clusters)) < 0.8) if self.max_traces > 1 else way
        skewed = (rng.lognormal(0, 0.7, len(clusters)) - math.exp(0.245)) / 1.0127  # mean 0, deviation 1
        return Pairs(clusters, of_cluster[clusters], right, self.loss_gain - skewed)


def is_promoted(pairs: Pairs, level: float, *, second_level: float | None = None) -> bool:
    if primary_test(pairs, level).is_passed:
        return True
    return second_level is not None and second_route(pairs, second_level, DELTA).is_passed


# -- equal candidates ------------------------------------------------------------------------------------------------


def spent(unpromoted: int, _promoted_at: Sequence[int], _round: int) -> float:
    return BUDGET_PER_ROUTE * History(unpromoted).share_of_budget


def unspent(_unpromoted: int, _promoted_at: Sequence[int], _round: int) -> float:
    return BUDGET_PER_ROUTE


_GAMMA = np.array([0.0] + [math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j)))) for j in range(1, 10_000)])
_GAMMA /= _GAMMA.sum()


def lord(_unpromoted: int, promoted_at: Sequence[int], number: int) -> float:
    """LORD++ with its wealth split in half: false discovery rate, not family-wise error, after the first promotion."""
    total, start = BUDGET_PER_ROUTE, BUDGET_PER_ROUTE / 2
    level = _GAMMA[number] * start
    if promoted_at:
        level += (total - start) * _GAMMA[number - promoted_at[0]]
        level += total * sum(_GAMMA[number - at] for at in promoted_at[1:])
    return float(level)


Schedule = Callable[[int, Sequence[int], int], float]


def history(worlds: Sequence[World], schedule: Schedule, rng: np.random.Generator, *, has_second: bool) -> list[int]:
    """The rounds (from 1) that promoted; `worlds` in turn."""
    promoted_at: list[int] = []
    for number in range(1, NUM_ROUNDS + 1):
        level = schedule(number - 1 - len(promoted_at), promoted_at, number)
        if is_promoted(worlds[number % len(worlds)].draw(rng), level, second_level=level if has_second else None):
            promoted_at.append(number)
    return promoted_at


def promotions(
    worlds: Sequence[World], schedule: Schedule, num: int, seed: int, *, has_second: bool = True
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    counts = np.array([len(history(worlds, schedule, rng, has_second=has_second)) for _ in bar(num)])
    return {"any_percent": round(100 * float((counts > 0).mean()), 2), "mean": round(float(counts.mean()), 4)}


EQUAL_WORLDS = {
    "100 clusters": World(100),
    "150 clusters": World(150),
    "600 clusters": World(600),
    "150 clusters of 1 to 5 traces": World(150, max_traces=5),
    "150 clusters, 25 without a call": World(150, share_call=5 / 6),
}


# -- a candidate that learns from the gate ---------------------------------------------------------------------------


def memorizing_history(rng: np.random.Generator, *, is_fresh: bool, num_fresh: int = 150) -> int:
    """Promotions of a candidate that is no better than its opponent on anything it has not been gated on."""
    past, known, seen, num_promoted = History(), np.zeros(0, np.int64), 0, 0
    skills = rng.random((20, 4000)) < 0.6  # twenty candidates, each right on 60 % of all questions there are
    answers = rng.random(4000) < 0.6  # the opponent
    for _ in range(NUM_ROUNDS):
        best = int(skills[:, known].sum(axis=1).argmax()) if len(known) else 0
        ours = skills[best].copy()
        ours[known] = True
        # A third of the questions come again; a gate for which old clusters count asks all that it has ever had.
        repeated = rng.choice(known, num_fresh // 2, replace=False) if is_fresh and len(known) else known
        questions = np.concatenate([np.arange(seen, seen + num_fresh), repeated])
        traces = [
            _trace(i, int(q), bool(ours[q]), bool(answers[q])) for i, q in enumerate(questions, start=10_000 * seen)
        ]
        seen += num_fresh
        decision = decide(
            traces,
            adapter="a",
            candidate="a@2",
            opponent="a@1",
            has_live=True,
            history=past if is_fresh else History(past.num_unpromoted),
            regression=KEPT,
        )
        past = past.after(decision)
        num_promoted += decision.outcome is Outcome.PROMOTE
        known = np.union1d(known, questions)
    return num_promoted


def _trace(position: int, question: int, ours: bool, theirs: bool) -> PairedTrace:
    expects_call = question % 3 > 0
    sides = [Judged(right is expects_call, right, True, right) for right in (ours, theirs)]
    return PairedTrace(
        trace_id=str(position),
        cluster=str(question),
        position=position,
        label=Label.KNOWN_ANSWER,
        expects_call=expects_call,
        is_seen=True,
        candidate=sides[0],
        opponent=sides[1],
    )


def memorizing(num: int, seed: int, *, is_fresh: bool) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    counts = np.array([memorizing_history(rng, is_fresh=is_fresh) for _ in bar(num)])
    return {"any_percent": round(100 * float((counts > 0).mean()), 2), "mean": round(float(counts.mean()), 4)}


# -- one decision ----------------------------------------------------------------------------------------------------


def rate(world: World, num: int, seed: int, level: float, *, has_second: bool = False) -> float:
    """Percent of gates that promote."""
    rng = np.random.default_rng(seed)
    second = level if has_second else None
    num_promoted = sum(is_promoted(world.draw(rng), level, second_level=second) for _ in bar(num))
    return round(100 * num_promoted / num, 2)


def traded(num_call: int, num_none: int, trade: float) -> World:
    """Wins `trade` of the calls, loses as much of the no-calls."""
    return World(num_call + num_none, num_call / (num_call + num_none), (trade, 0.0), (0.0, trade))


def gaining(num_clusters: int, gain: float) -> World:
    """`gain` in both strata, 15 % discordant pairs, or a twentieth more than the gain."""
    discordant = max(0.15, gain + 0.05)
    better, worse = (discordant + gain) / 2, (discordant - gain) / 2
    return World(num_clusters, better=(better, better), worse=(worse, worse))


def equal_with_lower_loss(num_clusters: int, loss_gain: float) -> World:
    return World(num_clusters, better=(0.03, 0.03), worse=(0.03, 0.03), loss_gain=loss_gain)


SIZES, GAINS, DECISIONS, LOSS_GAINS = (100, 200, 400, 800), (0.05, 0.10, 0.15, 0.20), (1, 5, 20), (0.1, 0.2, 0.4)
TRADES = ((75, 25), (150, 50), (400, 100), (475, 25))


# -- output ----------------------------------------------------------------------------------------------------------


def bar(num: int) -> tqdm:
    return tqdm(range(num), leave=False, disable=None)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"\n{title}\n", "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def measure(num: int, seed: int, show: Callable[[str], None]) -> dict[str, object]:
    result: dict[str, object] = {"histories": num, "rounds": NUM_ROUNDS}
    equal = {name: promotions([world], spent, num, seed) for name, world in EQUAL_WORLDS.items()}
    plain = EQUAL_WORLDS["150 clusters"]
    equal["150 clusters, 2.5 % every round"] = promotions([plain], unspent, max(num // 10, 1), seed)
    heads = ("equal candidates, 20 rounds", "any promoted %", "promotions a history")
    show(table("False promotions", heads, [(k, v["any_percent"], v["mean"]) for k, v in equal.items()]))
    better = gaining(200, 0.10)
    cases = {"none is better": [plain], "every fourth +10 points": [better, plain, plain, plain], "all +10": [better]}
    schedules = {
        name: {
            case: promotions(worlds, rule, max(num // 2, 1), seed, has_second=False) for case, worlds in cases.items()
        }
        for name, rule in (("6 / (pi j)^2, given back", spent), ("LORD++", lord))
    }
    heads = ("promotions in 20 rounds, primary test", *cases)
    show(table("Schedules", heads, [(k, *(one["mean"] for one in v.values())) for k, v in schedules.items()]))
    learned = {
        "fresh clusters only (the gate)": memorizing(max(num // 5, 1), seed, is_fresh=True),
        "old clusters count too": memorizing(max(num // 50, 1), seed, is_fresh=False),
    }
    heads = ("candidate tuned on earlier gates", *heads[1:])
    show(table("A candidate that memorizes", heads, [(k, v["any_percent"], v["mean"]) for k, v in learned.items()]))
    trades = {
        f"{c} calls, {n} without": [rate(traded(c, n, t), num, seed, LEVEL_ONE) for t in (0.05, 0.1, 0.2)]
        for c, n in TRADES
    }
    heads = ("promoted % at level 1.52 %", "5 % traded", "10 %", "20 %")
    show(table("Trades without a gain", heads, [(k, *v) for k, v in trades.items()]))
    power = {
        f"{n} clusters, decision {k}": [
            rate(gaining(n, gain), max(num // 2, 1), seed, spent(k - 1, (), k)) for gain in GAINS
        ]
        for n in SIZES
        for k in DECISIONS
    }
    heads = ("promoted %", *(f"+{100 * gain:.0f} points" for gain in GAINS))
    show(table("Power of the primary test", heads, [(k, *v) for k, v in power.items()]))
    second = {
        f"{n} clusters": [
            rate(equal_with_lower_loss(n, g), max(num // 10, 1), seed, LEVEL_ONE, has_second=True) for g in LOSS_GAINS
        ]
        for n in SIZES
    }
    heads = ("promoted %, first decision", *(f"loss -{gain} sd" for gain in LOSS_GAINS))
    show(table("Power of the second route", heads, [(k, *v) for k, v in second.items()]))
    return result | {
        "equal": equal,
        "schedules": schedules,
        "memorizing": learned,
        "trades": trades,
        "power": power,
        "second": second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=2000, help="simulated; a tenth to a half where each is slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    result = measure(args.histories, args.seed, (lambda text: None) if args.json else print)
    sys.stdout.flush()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
