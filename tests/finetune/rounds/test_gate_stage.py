"""The gate of a round against a scripted server, and what comes of its decision."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from finetune.config import FinetuneSettings
from finetune.gate.settings import GateSettings
from finetune.rounds.asking import Answer, Answers
from finetune.rounds.engine import Done, Over, RoundEngine, Task
from finetune.rounds.errors import CanaryHeldError, RoundError
from finetune.rounds.gating import decision_of, expected_of, run_gate
from finetune.rounds.lease import Lease, release, take
from finetune.rounds.promotion import abandon, carry_out, take_in
from finetune.rounds.round import Phase, Result, Round
from finetune.rounds.runner import Runner
from finetune.rounds.store import RoundStore
from finetune.rounds.weights import pack
from finetune.serving.errors import RefusedError, ServerDownError
from server.adapters.states import State
from server.adapters.version import VersionRef
from server.storage.database import Database
from server.traces.lineage import Lineage
from tests.finetune.fake_server import BASE, BASE_DIGEST, FakeServer, silent
from tests.finetune.rounds.held_out import Held, always_calling, good, held_out, questions

TOOLS_1 = VersionRef("tools", 1)


class Bench:
    """A round that has come to its import, and the server it talks to."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.server = FakeServer(database, self.answer)
        self.api = self.server.api()
        self.store = RoundStore(database)
        self.lease: Lease = take(database, "tools")
        self.lineage = Lineage(database)
        self.folder = folder
        self.answers: dict[str, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {}
        self.progress: list[tuple[int, int]] = []
        self.begin()

    def answer(self, model: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.answers.get(model, lambda body: silent(model, body))(body)

    def begin(self, **changes: Any) -> None:
        settings = {"cause": "test", "base_digest": BASE_DIGEST, "settings": {}} | changes
        self.round = self.store.begin(self.lease, **settings)
        self.lineage.add_snapshot("sha256:s", "tools", {"train": [1]})
        for _ in range(3):
            self.round = self.store.advance(self.lease, self.round, {}, snapshot="sha256:s")

    def task(self) -> Task:
        def note(facts: Mapping[str, Any]) -> Round:
            self.round = self.store.note(self.lease, self.round, facts)
            return self.round

        folder = self.folder / f"{self.round.ref}"
        folder.mkdir(exist_ok=True)
        return Task(
            self.round, folder, lambda: None, note, lambda done, total, **values: self.progress.append((done, total))
        )

    def take_in(self, content: str = "weights") -> Done:
        task = self.task()
        peft = task.folder / "peft"
        peft.mkdir(exist_ok=True)
        (peft / "adapter_config.json").write_text(content)
        pack(peft, task.folder / "adapter.zip")
        done = take_in(task, self.api, self.lineage, task.folder / "adapter.zip")
        self.round = self.store.advance(self.lease, self.round, done.facts, **done.columns)
        return done

    def import_another(self) -> None:
        """A human's, beside the round's."""
        archive = self.folder / "other"
        archive.write_bytes(b"other")
        self.api.import_version("tools", archive, base_digest=BASE_DIGEST, origin="a human", reason="test", parent=None)

    def gate(self, rows: list[Any], **changes: Any) -> Done:
        options: dict[str, Any] = {
            "settings": GateSettings(),
            "max_tokens": 64,
            "max_traces": 1000,
            "concurrency": 3,
        }
        done = run_gate(self.task(), self.api, Held(rows), self.store.list("tools"), **(options | changes))  # type: ignore[arg-type]
        self.round = self.store.advance(self.lease, self.round, done.facts, **done.columns)
        return done

    def promote(self) -> Over:
        over = carry_out(self.task(), self.api, canary_share=0.2)
        self.round = self.store.finish(self.lease, self.round, over.result, over.reason)
        return over

    def state(self, ref: VersionRef = TOOLS_1) -> State:
        return self.server.registry.version(ref).state


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Bench:
    return Bench(database, tmp_path)


def test_a_better_version_becomes_the_canary(bench: Bench) -> None:
    bench.answers["tools@1"] = good
    done = bench.take_in()
    assert done.columns == {"version": 1}
    assert bench.server.registry.version(TOOLS_1).origin == "tools-r1"
    bench.gate(questions())
    decision = decision_of(bench.round)
    assert (decision.candidate, decision.opponent, decision.has_live) == ("tools@1", BASE, False)
    assert decision.primary is not None
    assert decision.primary.difference == pytest.approx(0.5), "the base calls nothing: half of the balanced accuracy"
    assert bench.progress[-1] == (240, 240)
    assert bench.promote().result is Result.CANARY
    assert bench.state() is State.CANARY
    adapter = bench.server.registry.adapter("tools")
    assert adapter.canary_share == 0.2
    assert "balanced accuracy +50.0 points" in bench.server.registry.history("tools")[0].reason
    bench.store.get(bench.round.ref)
    again = carry_out(replace(bench.task(), round=bench.round), bench.api, canary_share=0.2)
    assert again.result is Result.CANARY, "killed after the act: it is done already"


def test_the_plain_recipe_is_rejected_for_what_it_broke(bench: Bench) -> None:
    bench.answers["tools@1"] = always_calling
    bench.take_in()
    bench.gate(questions())
    over = bench.promote()
    assert over.result is Result.REJECTED
    assert "no_call is 0.0 %, limit 80.0 %" in over.reason
    assert bench.state() is State.REJECTED


def test_without_enough_labels_nothing_is_asked(bench: Bench) -> None:
    bench.answers["tools@1"] = good
    bench.take_in()
    bench.gate(questions(num_call=50, num_none=30))
    assert bench.server.questions == []
    over = bench.promote()
    assert over.result is Result.NOT_ENOUGH_EVIDENCE
    assert over.reason == "80 fresh labelled episode clusters, 100 are needed"
    assert bench.state() is State.CANDIDATE, "a named human may still decide"


def test_what_a_decision_has_used_is_not_used_again(bench: Bench) -> None:
    bench.take_in()
    bench.gate(questions())  # no better than the base
    assert bench.promote().result is Result.REJECTED
    bench.begin()
    bench.take_in("others")
    num_asked = len(bench.server.questions)
    done = bench.gate(questions() + questions(first=1000, num_call=60, num_none=0))
    assert done.facts["num_left_out"] == 120
    assert decision_of(bench.round).num_clusters == 60
    assert len(bench.server.questions) == num_asked


def test_nor_is_it_by_a_round_that_begins_anew(bench: Bench) -> None:
    bench.take_in()
    bench.gate(questions())
    first = bench.round.decision
    bench.round = bench.store.restart(bench.lease, bench.round, "1 of its traces were deleted")
    assert bench.round.decision is None
    for _ in range(3):
        bench.round = bench.store.advance(bench.lease, bench.round, {}, snapshot="sha256:s")
    bench.answers["tools@2"] = good
    bench.take_in("without it")
    done = bench.gate(questions())
    assert done.facts["num_left_out"] == 120
    assert bench.promote().result is Result.NOT_ENOUGH_EVIDENCE
    again = bench.store.restart(
        bench.lease, bench.store.begin(bench.lease, cause="test", base_digest="b", settings={}), ""
    )
    assert bench.store.get(bench.round.ref).facts["begin"]["decisions"] == [first]
    assert "decisions" not in again.facts["begin"], "nothing was decided"


def test_a_question_that_the_server_does_not_take_is_left_out(bench: Bench) -> None:
    def picky(body: Mapping[str, Any]) -> Mapping[str, Any]:
        if body["messages"][-1]["content"].endswith(" 7"):
            raise RefusedError(400, "This model takes at most 64 tokens.")
        return good(body)

    bench.answers["tools@1"] = picky
    bench.take_in()
    done = bench.gate(questions())
    assert done.facts["num_refused"] == 1
    assert decision_of(bench.round).num_clusters == 119
    assert bench.promote().result is Result.CANARY


@pytest.mark.parametrize("num_looks", [2, 9])
def test_another_server_may_not_have_heard_of_the_version_yet(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, num_looks: int
) -> None:
    monkeypatch.setattr("finetune.rounds.asking.FOLLOW_WAITS", (0.0, 0.0, 0.0))
    asked: Counter[str] = Counter()

    def heard_late(body: Mapping[str, Any]) -> Mapping[str, Any]:
        text = json.dumps(body["messages"])
        asked[text] += 1
        if asked[text] <= num_looks:
            raise RefusedError(404, "The model 'tools@1' does not exist.")
        return good(body)

    bench.answers["tools@1"] = heard_late
    bench.take_in()
    if num_looks == 2:
        assert bench.gate(questions()).facts["num_refused"] == 0
        assert bench.promote().result is Result.CANARY
    else:
        with pytest.raises(RefusedError, match="does not exist"):
            bench.gate(questions())


def test_a_server_that_restarts_in_the_gate_costs_no_answer(bench: Bench) -> None:
    bench.answers["tools@1"] = good
    bench.take_in()
    rows = questions()
    answer = bench.server.script
    num_answers = 0

    def dies(model: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal num_answers
        num_answers += 1
        if num_answers == 50:
            bench.server.down = 10**6
        return answer(model, body)

    bench.server.script = dies
    with pytest.raises(ServerDownError):
        bench.gate(rows, concurrency=1)
    known = Answers(bench.task().folder / "answers.jsonl")
    num_known = sum(known.get(model, row.id) is not None for row in rows for model in ("tools@1", BASE))
    assert num_known == 49, "the fiftieth was answered, but not scored"
    assert bench.state() is State.CANDIDATE
    bench.server.down, bench.server.script = 0, answer
    bench.server.questions.clear()
    bench.gate(rows)
    assert len(bench.server.questions) == 240 - num_known
    assert bench.promote().result is Result.CANARY


def test_the_opponent_is_the_live_version_from_beginning_to_end(bench: Bench) -> None:
    bench.take_in()
    bench.server.registry.promote(TOOLS_1, override=True, asked_by="a human", reason="test")
    bench.round = bench.store.finish(bench.lease, bench.round, Result.FAILED, "test")
    bench.begin()
    bench.take_in("others")
    bench.answers = {"tools@2": good}
    bench.task().note({"opponent": "tools@1", "has_live": True})
    bench.gate(questions(), regression=None)
    assert {model for model, _ in bench.server.questions} == {"tools@1", "tools@2"}
    assert bench.promote().result is Result.REJECTED, "without a regression set nothing replaces a live version"


def test_another_live_version_meanwhile_is_a_reason_to_stop(bench: Bench) -> None:
    bench.answers["tools@1"] = good
    bench.take_in()
    bench.import_another()
    bench.gate(questions())
    bench.server.registry.promote(VersionRef("tools", 2), override=True, asked_by="a human", reason="test")
    with pytest.raises(RoundError, match=r"compared tools@1 with the base, but tools@2 answers now"):
        carry_out(bench.task(), bench.api, canary_share=0.2)
    assert bench.state() is State.CANDIDATE


def test_what_passed_the_gate_is_not_thrown_away_for_a_canary_that_was_faster(bench: Bench) -> None:
    bench.answers["tools@1"] = good
    bench.take_in()
    bench.import_another()
    bench.gate(questions())
    bench.server.registry.start_canary(VersionRef("tools", 2), share=0.2, asked_by="a human", reason="test")
    over = carry_out(bench.task(), bench.api, canary_share=0.2)
    assert over.result is Result.FAILED
    assert over.reason.startswith("tools@2 is the canary already; tools@1 passed the gate and stays a candidate")
    assert bench.state() is State.CANDIDATE


def test_no_round_begins_beside_an_undecided_canary(bench: Bench, database: Database) -> None:
    bench.take_in()
    bench.store.finish(bench.lease, bench.round, Result.CANARY, "test")
    release(database, bench.lease)
    bench.server.registry.start_canary(TOOLS_1, share=0.2, asked_by="test", reason="test")
    engine, settings = cast("RoundEngine", None), FinetuneSettings.model_validate({})
    runner = Runner(
        database, bench.api, engine, bench.store, settings, BASE_DIGEST, bench.folder, bench.server.slept.append
    )
    with pytest.raises(CanaryHeldError, match="tools@1 is a canary and undecided"):
        runner.run("tools", cause="test")
    bench.store.request("tools", None)
    assert runner.run_requested("tools", cause="test") == []
    assert [one.adapter for one in bench.store.requests()] == ["tools"], "it waits"
    assert runner.undecided("nobody") is None


def test_the_newest_gold_is_asked_before_anything_else(bench: Bench) -> None:
    """Of a log in which most labels are no gold, the newest thousand would never be enough evidence."""
    bench.answers["tools@1"] = good
    bench.take_in()
    rows = questions()
    others = [
        held_out(1000 + number, expects_call=True, source="thumbs", target=row.target, request=row.request)
        for number, row in enumerate(rows)
    ]
    bench.gate([*rows, *others], max_traces=len(rows) + 10)
    decision = decision_of(bench.round)
    assert (decision.num_traces, decision.num_other_traces) == (len(rows), 10)
    assert decision.newest_position == max(row.seq for row in others)


def test_one_key_cannot_judge_alone(bench: Bench) -> None:
    """However much newer its own labels are than the others'."""
    bench.answers["tools@1"] = good
    bench.take_in()
    honest = [replace(one, key_id="honest") for one in questions(1, 200, 100)]
    flood = [replace(one, key_id="flood") for one in questions(301, 400, 200)]
    bench.gate([*honest, *flood], max_traces=500)
    asked = [body["messages"][-1]["content"] for model, body in bench.server.questions if model == "tools@1"]
    numbers = sorted(int(text.split()[1]) for text in asked)
    assert numbers == [*range(51, 301), *range(651, 901)], "the newest 250 of each"


def test_the_same_weights_again(bench: Bench) -> None:
    bench.take_in()
    bench.gate(questions())
    bench.promote()
    bench.begin()
    with pytest.raises(RoundError, match="the training gave tools@1 again, which is rejected"):
        bench.take_in()


def test_what_a_deleted_trace_taught_goes_no_further(bench: Bench) -> None:
    bench.take_in()
    bench.round = bench.store.restart(bench.lease, bench.round, "1 of its traces were deleted")
    assert bench.round.phase is Phase.SNAPSHOT
    for _ in range(3):
        bench.round = bench.store.advance(bench.lease, bench.round, {}, snapshot="sha256:s")
    assert bench.take_in("without it").columns == {"version": 2}
    assert bench.state() is State.REJECTED
    assert "deleted" in bench.server.registry.history("tools")[0].reason
    assert bench.state(VersionRef("tools", 2)) is State.CANDIDATE
    abandon(bench.api, bench.round, "it failed")
    assert bench.state(VersionRef("tools", 2)) is State.REJECTED


def test_a_base_that_changed(bench: Bench) -> None:
    bench.round = bench.store.finish(bench.lease, bench.round, Result.FAILED, "test")
    bench.begin(base_digest="sha256:" + "1" * 64)
    with pytest.raises(Exception, match="trained on sha256:1"):
        bench.take_in()


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers(path)
    one = Answer("tools@1", "trace-1", {"role": "assistant", "content": "x"}, "stop", 0.5)
    answers.add(one)
    path.write_bytes(path.read_bytes() + b'{"model": "tools@1", "id": "tr')
    answers = Answers(path)
    assert answers.get("tools@1", "trace-1") == one
    two = replace(one, id="trace-2")
    answers.add(two)
    assert Answers(path).get("tools@1", "trace-2") == two


def test_accepted_values_may_be_told_in_a_comment() -> None:
    comment = json.dumps({"accepted": [{"add": {"a": [1, 2]}}]})
    row = held_out(7, expects_call=True)
    known = {"source": "known_answer", "score": 1.0, "correction": None, "label": None}
    (expected,) = expected_of(replace(row, feedback=[known | {"comment": comment}]))
    assert expected.arguments["a"].values == (1, 2)
    for plain in ("{not JSON", "thank you", '{"other": 1}', None):
        (expected,) = expected_of(replace(row, feedback=[known | {"comment": plain}]))
        assert expected.arguments["a"].values == (7,)
    assert expected_of(replace(row, feedback=[known | {"comment": '{"accepted": []}'}])) == ()
    thumbs = known | {"source": "thumbs", "comment": '{"accepted": []}'}
    (expected,) = expected_of(replace(row, feedback=[known | {"comment": comment}, thumbs]))
    assert expected.arguments["a"].values == (1, 2), "a user's comment is no known answer"
    newer = known | {"comment": None, "correction": row.target}
    (expected,) = expected_of(replace(row, feedback=[known | {"comment": comment}, newer]))
    assert expected.arguments["a"].values == (7,), "a newer right answer is what counts"


@pytest.mark.parametrize(
    "comment",
    ['{"accepted": [{"f": 5}]}', '{"accepted": [{"f": {"a": ' + "[" * 900 + "]" * 900 + "}}]}", '{"a": ' * 9999],
)
def test_a_comment_that_is_no_label_costs_one_trace_at_most(bench: Bench, comment: str) -> None:
    bench.answers["tools@1"] = good
    bench.take_in()
    rows = questions()
    given = {"source": rows[0].source, "score": 1.0, "correction": None, "label": None, "comment": comment}
    rows[0] = replace(rows[0], feedback=[given])
    bench.gate(rows)
    assert decision_of(bench.round).num_clusters >= len(rows) - 1
