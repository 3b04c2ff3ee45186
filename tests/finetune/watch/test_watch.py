"""One version's watch: its verdicts, restarts, replays, and input that it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from finetune.watch.processes import MAX_STRATA
from finetune.watch.settings import WatchSettings
from finetune.watch.watch import Episode, Phase, Verdict, Watch, WatchError


def episodes(
    count: int, *, share: float = 0.5, malformed: float = 0.02, start: int = 0, seed: int = 1
) -> list[Episode]:
    """`malformed`: of the new version."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(start, start + count):
        is_new = bool(rng.random() < share)
        made.append(
            Episode(
                position=10 * number,
                is_new=is_new,
                share_new=share,
                stratum=f"tools {number % 3}",
                call_rate=float(rng.random() < 0.6),
                tool_errors=float(rng.random() < 0.05),
                retries=float(rng.random() < 0.05),
                malformed=float(rng.random() < (malformed if is_new else 0.02)),
                feedback=float(rng.random() < 0.8) if number % 4 == 0 else None,
                latency_seconds=float(rng.lognormal()),
            )
        )
    return made


def run(watch: Watch, given: list[Episode]) -> list[Verdict]:
    return [watch.take(episode) for episode in given]


def test_a_harmless_canary_goes_live_once_and_stays() -> None:
    watch = Watch("tools@2")
    verdicts = run(watch, episodes(1500))
    assert verdicts.count(Verdict.PROMOTE) == 1
    assert verdicts.count(Verdict.ROLL_BACK) == 0
    assert watch.phase is Phase.LIVE
    assert all(e.e_value >= e.needed for e in watch.evidence() if "excluded" in e.what)
    run(watch, episodes(300, share=0.9, start=1500, seed=2))
    assert watch.phase is Phase.LIVE
    assert watch.e_value < 100


def test_harm_ends_a_canary_and_a_live_version() -> None:
    for phase, share in ((Phase.CANARY, 0.2), (Phase.LIVE, 0.9)):
        watch = Watch("tools@2", phase=phase)
        verdicts = run(watch, episodes(800, share=share, malformed=0.6))
        first = verdicts.index(Verdict.ROLL_BACK)
        assert set(verdicts[:first]) == {Verdict.GO_ON}
        assert set(verdicts[first:]) == {Verdict.ROLL_BACK}
        assert watch.phase is Phase.ENDED
        worst = max(watch.evidence(), key=lambda e: e.e_value / e.needed)
        assert (worst.metric, worst.what) == ("malformed", "rise")
        assert worst.new_mean is not None
        assert worst.old_mean is not None
        assert worst.new_mean > 0.4 > 0.1 > worst.old_mean


def test_evidence_from_the_canary_counts_on_when_live() -> None:
    watch = Watch("tools@2")
    run(watch, episodes(1000))
    assert watch.phase is Phase.LIVE
    before = watch.e_value
    assert watch.take(episodes(1, start=1000)[0]) is Verdict.GO_ON
    assert watch.e_value == pytest.approx(before, rel=0.2)
    assert watch.e_value != 1.0


def test_a_restart_at_any_episode_changes_nothing() -> None:
    given = episodes(240)
    whole, restarted = Watch("tools@2"), Watch("tools@2")
    for number, episode in enumerate(given):
        whole.take(episode)
        restarted.take(episode)
        if number % 40 == 0:
            restarted = Watch.from_json(restarted.to_json())
    assert restarted.to_json() == whole.to_json()
    assert restarted.evidence() == whole.evidence()
    assert restarted.e_value == whole.e_value


def test_a_replay_is_ignored() -> None:
    given = episodes(50)
    watch = Watch("tools@2")
    run(watch, given)
    state = watch.to_json()
    assert set(run(watch, given)) == {Verdict.GO_ON}
    assert watch.to_json() == state


def test_an_episode_without_a_draw_tells_nothing() -> None:
    watch = Watch("tools@2")
    for number, share in enumerate((0.0, 1.0)):
        watch.take(replace(episodes(1)[0], position=number, share_new=share))
    assert watch.num_episodes == [0, 0]
    assert watch.position == 1


def test_shares_above_one_count_as_one_and_late_strata_share_a_place() -> None:
    given = episodes(3 * MAX_STRATA)
    watch, plain = Watch("tools@2"), Watch("tools@2")
    for number, episode in enumerate(given):
        watch.take(replace(episode, stratum=f"s{number}", tool_errors=7.0))
        plain.take(replace(episode, stratum=f"s{number}", tool_errors=1.0))
    assert watch.to_json() == plain.to_json()
    assert len(json.loads(watch.to_json())["strata"]) == MAX_STRATA


@pytest.mark.parametrize(
    ("field", "value"),
    [("call_rate", -0.1), ("latency_seconds", float("nan")), ("feedback", float("inf")), ("share_new", 1.5)],
)
def test_what_cannot_be_is_refused_and_leaves_no_trace(field: str, value: float) -> None:
    watch = Watch("tools@2")
    state = watch.to_json()
    with pytest.raises(WatchError, match=field):
        watch.take(replace(episodes(1)[0], **{field: value}))
    assert watch.to_json() == state


def test_a_state_that_is_none_is_refused() -> None:
    good = json.loads(Watch("tools@2").to_json())
    bad = [
        "{}",
        "[",
        json.dumps({**good, "phase": "flying"}),
        json.dumps({**good, "processes": {**good["processes"], "sums": [[1.0]]}}),
        json.dumps({**good, "processes": {}}),
    ]
    for text in bad:
        with pytest.raises(WatchError, match="no state of a watch"):
            Watch.from_json(text)


def test_settings_travel_with_the_state() -> None:
    settings = WatchSettings(call_rate_change=(-0.1, 0.9), latency_ratio=2.0)
    assert Watch.from_json(Watch("tools@2", settings).to_json()).settings == settings
