"""From a log to a snapshot: what is kept, what is dropped for which reason, and that it is the same every time."""

import gzip
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from finetune.dataset.errors import NothingToLearnError, SnapshotError
from finetune.dataset.freeze import freeze
from finetune.dataset.jsonl import PARTIAL, remove_partial
from finetune.dataset.render import Renderer, chat_request
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import FILES, Selection, Snapshot, erase_deleted, snapshots_of
from server.traces.deletion import TraceDeletion
from server.traces.exchange import import_lines
from server.traces.feedback import Feedback, Target
from server.traces.filters import TraceFilter
from server.traces.lineage import Lineage
from server.traces.record import Answer
from server.traces.tables import feedback, traces
from server.traces.viewer import ADMIN
from tests.finetune.dataset.log import TOOL, Log, question, weather
from tests.server.openai.scripted import CHATML
from tests.server.traces.builders import assistant, call, make_record, result, user


def frozen(log: Log, renderer: Renderer, root: Path, **selection: Any) -> Snapshot:
    return freeze(log.database, renderer, Selection(adapter="tools", **selection), root)


def dropped(snapshot: Snapshot, part: Any = "train") -> dict[str, int]:
    return dict(snapshot.manifest.dropped[part])


def decoded(renderer: Renderer, row: ExampleRow) -> str:
    return renderer.tokenizer.decode(row.answer_ids, skip_special=False)


def test_corrections_become_calls_and_silence_stays_a_target(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    called = log.teach(1)
    silent = log.ask(question(2), assistant("I can only tell the weather."))
    log.judge(silent, score=1.0)
    wrong = log.ask(question(3), weather("Rome"))
    log.judge(wrong, correction=assistant("No tool fits that."))
    snapshot = frozen(log, renderer, tmp_path)
    rows = list(snapshot.train())
    assert [(row.trace_id, row.kind, row.origin) for row in rows] == [
        (called.id, "call", "correction"),
        (silent.id, "no_call", "served"),
        (wrong.id, "no_call", "correction"),
    ]
    assert [decoded(renderer, row) for row in rows] == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "City 1"}}\n</tool_call><|im_end|>',
        "I can only tell the weather.<|im_end|>",
        "No tool fits that.<|im_end|>",
    ]
    asked = chat_request({"messages": [user(question(2))], "tools": [TOOL]})
    assert list(rows[1].prompt_ids) == renderer.prompt(asked)
    assert dict(snapshot.manifest.kinds) == {"call": 1, "no_call": 2}
    assert list(snapshot.manifest.tools) == ["weather"]
    assert snapshot.manifest.num_train_tokens == sum(row.num_tokens for row in rows)


def test_every_filter_counts_what_it_drops(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(0)
    right = {"score": 1.0}
    for record in (
        log.ask(question(1), tool_choice="required", answer=weather("Rome")),
        log.ask(question(2), tool_choice={"type": "function", "function": {"name": "weather"}}),
        log.ask(question(3), tool_choice="none"),
        log.ask(question(4), status="failed"),
        log.ask(question(5), finish="length"),
        log.ask(question(6), num_answers=2),
        log.ask(question(7), assistant(None, call("weather", '{"town": "Rome"}'))),
        log.ask(question(8), assistant('<tool_call>{"name": "weather"')),
        log.ask(question(9), messages=[user("my key is sk-" + "a" * 30)]),
        log.ask(question(10), messages=[user("x " * 3000)]),
        log.ask(question(11), sampling={"continue_final_message": True}),
        log.ask(question(12), assistant("")),
        log.ask(question(13), assistant("a <|im_start|> b")),
    ):
        log.judge(record, **right)
    log.judge(log.ask(question(14)), score=0.2)
    log.ask(question(15))
    log.teach(16, purpose="evaluation")
    log.teach(17, adapter="other")
    log.train.write([make_record(None, adapter="tools", endpoint="completions", prompt="x")])
    snapshot = frozen(log, renderer, tmp_path)
    assert len(list(snapshot.train())) == 1
    assert dropped(snapshot) == {
        "continuation": 1,
        "empty": 1,
        "forbidden_tool_choice": 1,
        "forced_tool_choice": 2,
        "low_score": 1,
        "malformed_call": 2,
        "not_chat": 1,
        "not_ok": 1,
        "redacted": 1,
        "several_choices": 1,
        "too_long": 1,
        "truncated": 1,
        "unlabelled": 1,
        "unrenderable": 1,
    }


def test_a_correction_counts_whatever_became_of_the_answer(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    for number, changes in enumerate(({"status": "cancelled"}, {"finish": "length"}, {"num_answers": 2})):
        log.teach(number, **changes)
    record = log.teach(5)
    log.judge(record, "user_correction", correction=weather("Latest"))
    rows = list(frozen(log, renderer, tmp_path).train())
    assert len(rows) == 4
    assert "Latest" in decoded(renderer, rows[-1])


def test_a_tool_error_is_no_success_and_unlabelled_answers_can_be_asked_for(
    log: Log, renderer: Renderer, tmp_path: Path
) -> None:
    made = call("weather", '{"city": "Rome"}')
    first = log.ask(question(1), assistant(None, made))
    log.ask(
        "", assistant("Sorry."), messages=[user(question(1)), first.answers[0].message, result(made["id"], "Error: no")]
    )
    log.ask(question(2))
    snapshot = frozen(log, renderer, tmp_path, keep_unlabelled=True)
    assert [row.question for row in snapshot.train()] == [question(1), question(2)]
    assert dropped(snapshot) == {"tool_error": 1}


def test_the_episodes_judgement_counts_where_the_trace_has_none(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    one = log.ask(question(1))
    log.feedback.add(ADMIN, Target("episode", one.episode.id), Feedback(source="thumbs", score=1.0))
    two = log.ask(question(2))
    log.feedback.add(ADMIN, Target("episode", two.episode.id), Feedback(source="thumbs", score=1.0))
    log.judge(two, "thumbs", score=0.0)
    snapshot = frozen(log, renderer, tmp_path)
    assert [row.trace_id for row in snapshot.train()] == [one.id]


def test_duplicates_go_and_the_newest_stays(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    older, newer = log.teach(1), log.teach(1)
    other = log.ask(question(1))
    log.judge(other, correction=assistant("Another answer to it."))
    snapshot = frozen(log, renderer, tmp_path)
    assert [row.trace_id for row in snapshot.train()] == [newer.id, other.id]
    assert older.id not in snapshot.manifest.traces["train"]
    assert dropped(snapshot) == {"duplicate": 1}


def test_nothing_near_a_held_out_question_is_trained_on(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    text = "Please calculate the area of a triangle with a base of ten units and a height of five units, thank you"
    held = log.ask(text, side="held_out", tools=[])  # without a label: it may get one tomorrow
    near = log.ask(text.replace("thank you", "thanks!"))
    log.judge(near, score=1.0)
    log.teach(1)
    snapshot = frozen(log, renderer, tmp_path)
    assert log.clients["train"].side_of(near) == "train"
    assert log.clients["train"].side_of(held) == "held_out"
    assert len(list(snapshot.train())) == 1
    assert dropped(snapshot) == {"near_held_out": 1}
    assert dropped(snapshot, "held_out") == {"unlabelled": 1}


def test_held_out_rows_hold_request_label_and_target(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(0)
    known = log.teach(1, side="held_out")
    log.judge(known, "user_correction", correction=assistant("The user thinks otherwise."))
    liked = log.ask(question(2), assistant("Fine."), side="held_out", version="tools@3")
    log.judge(liked, "thumbs", score=1.0)
    partly = log.ask(question(3), side="held_out")
    log.judge(partly, "thumbs", score=0.7)
    one, two = frozen(log, renderer, tmp_path).held_out()
    assert (one.id, one.source, one.origin, one.kind) == (known.id, "known_answer", "correction", "call")
    assert one.target["tool_calls"][0]["function"]["arguments"] == '{"city": "City 1"}'
    assert one.request["messages"] == [user(question(1))]
    assert one.request["tools"] == [TOOL]
    assert [given["source"] for given in one.feedback] == ["known_answer", "user_correction"]
    assert one.served == {"role": "assistant", "content": "Hm."}
    assert renderer.tokenizer.decode(one.answer_ids).startswith("<tool_call>")
    assert (two.id, two.source, two.origin, two.version) == (liked.id, "thumbs", "served", "tools@3")


def test_the_gate_asks_what_was_asked(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    """Its request, written and read again, has the tokens that were served: keys keep their order."""
    properties = {name: {"type": "integer", "description": f"the {name}"} for name in ("years", "amount", "rate")}
    schema = {"type": "object", "properties": properties, "required": ["years", "amount"]}
    tool = {"type": "function", "function": {"name": "interest", "description": "of a loan", "parameters": schema}}
    held = log.ask(question(1), side="held_out", tools=[tool])
    log.judge(held, correction=assistant("No tool fits that."))
    log.teach(2)
    (row,) = frozen(log, renderer, tmp_path).held_out()
    assert list(row.request["tools"][0]["function"]["parameters"]["properties"]) == ["years", "amount", "rate"]
    asked = renderer.answer(chat_request(row.request), row.target)
    assert list(asked.prompt_ids) == list(row.prompt_ids)


def test_equal_and_nearly_equal_held_out_questions_are_one_cluster(
    log: Log, renderer: Renderer, tmp_path: Path
) -> None:
    log.teach(0)
    text = "Please calculate the area of a triangle with a base of ten units and a height of five units, thank you"
    for number, asked in enumerate((question(1), text, text + "!", text, question(2))):
        log.judge(log.ask(asked, side="held_out", tools=[TOOL] if number != 3 else []), score=1.0)
    clusters = [row.cluster for row in frozen(log, renderer, tmp_path).held_out()]
    assert clusters[1] == clusters[2] == clusters[3]
    assert len(set(clusters)) == 3


def test_the_same_log_gives_the_same_snapshot_and_another_log_another(
    log: Log, renderer: Renderer, tmp_path: Path
) -> None:
    for number in range(3):
        log.teach(number)
    log.teach(10, side="held_out")
    one, two = frozen(log, renderer, tmp_path), frozen(log, renderer, tmp_path)
    elsewhere = frozen(log, renderer, tmp_path / "elsewhere")
    assert one.digest == two.digest == elsewhere.digest
    assert [path.name for path in (tmp_path / "tools").iterdir()] == [one.path.name]
    log.teach(4)
    assert frozen(log, renderer, tmp_path).digest != one.digest
    assert len(snapshots_of(tmp_path, "tools")) == 2
    one.verify()


def test_a_changed_snapshot_is_refused(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(1)
    snapshot = frozen(log, renderer, tmp_path)
    content = gzip.decompress((snapshot.path / FILES["train"]).read_bytes())
    (snapshot.path / FILES["train"]).write_bytes(gzip.compress(content.replace(b"call", b"cell")))
    with pytest.raises(SnapshotError, match=r"train\.jsonl\.gz was changed"):
        snapshot.verify()
    manifest = snapshot.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"min_score":0.5', b'"min_score":0.0'))
    with pytest.raises(SnapshotError, match="its manifest was changed"):
        Snapshot.open(snapshot.path)
    manifest.write_bytes(b"{}")
    with pytest.raises(SnapshotError, match="cannot be read"):
        Snapshot.open(snapshot.path)
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        Snapshot.open(tmp_path / "nowhere")


def test_nothing_to_learn_is_an_answer_with_its_reasons(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(NothingToLearnError, match="there are no traces at all"):
        frozen(log, renderer, tmp_path)
    log.ask(question(1))
    log.judge(log.ask(question(2)), score=0.1)
    with pytest.raises(
        NothingToLearnError, match=r"0 usable examples, at least 1 .* low_score 1, unlabelled 1"
    ) as told:
        frozen(log, renderer, tmp_path)
    assert told.value.dropped == {"low_score": 1, "unlabelled": 1}
    assert list((tmp_path / "tools").iterdir()) == []


def test_one_key_cannot_teach_alone(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    for number in range(8):
        log.teach(number, key_id="flood")
    for number in range(8, 11):
        log.teach(number, key_id="honest")
    snapshot = frozen(log, renderer, tmp_path, min_key_examples=2)
    kept = list(snapshot.train())
    assert [row.question for row in kept] == [question(number) for number in range(5, 11)]  # the newest of each
    assert dropped(snapshot) == {"key_share": 5}
    small = frozen(log, renderer, tmp_path, min_key_examples=1, max_examples=4)
    assert dropped(small) == {"key_share": 1, "over_budget": 6}


def test_the_budget_takes_the_newest(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    for number in range(5):
        log.teach(number)
        log.teach(100 + number, side="held_out")
    snapshot = frozen(log, renderer, tmp_path, max_examples=2, max_held_out=1, max_scanned=4)
    assert [row.question for row in snapshot.train()] == [question(3), question(4)]
    assert [row.question for row in snapshot.held_out()] == [question(104)]
    assert dropped(snapshot) == {"over_budget": 3}
    assert dropped(snapshot, "held_out") == {"over_budget": 4}


def test_one_key_does_not_fill_what_is_held_out(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(20)
    for number in range(3):
        log.teach(number, key_id="honest", side="held_out")
    for number in range(3, 11):
        log.teach(number, key_id="flood", side="held_out")
    snapshot = frozen(log, renderer, tmp_path, min_key_examples=2, max_held_out=8)
    kept = [(row.question, row.key_id) for row in snapshot.held_out()]
    assert [one for one, key in kept if key == "honest"] == [question(number) for number in range(3)]
    assert [one for one, key in kept if key == "flood"] == [question(number) for number in range(7, 11)], "the newest"
    assert dropped(snapshot, "held_out") == {"key_share": 4}


def test_of_more_held_out_traces_than_fit_gold_stays(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(9)
    for number in range(3):
        record = log.ask(question(number), weather("X"), side="held_out")
        log.judge(record, score=1.0, source="known_answer" if number < 2 else "thumbs")
    snapshot = frozen(log, renderer, tmp_path, max_held_out=2)
    assert [row.question for row in snapshot.held_out()] == [question(0), question(1)]
    assert dropped(snapshot, "held_out") == {"over_budget": 1}
    assert [row.question for row in frozen(log, renderer, tmp_path).held_out()] == [question(n) for n in range(3)]


def test_imports_teach_their_last_answer_or_all(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    def line(**last: Any) -> str:
        turns = [user(question(1)), assistant("one"), user("more"), assistant("two") | last]
        return json.dumps({"messages": turns})

    assert import_lines(log.train, ADMIN, [line()], adapter="tools") == 1
    rows = list(frozen(log, renderer, tmp_path).train())
    assert [(decoded(renderer, row), row.source) for row in rows] == [("two<|im_end|>", "import")]
    rows = list(frozen(log, renderer, tmp_path, all_import_turns=True).train())
    assert [decoded(renderer, row) for row in rows] == ["one<|im_end|>", "two<|im_end|>"]
    assert len({row.id for row in rows}) == 2
    import_lines(log.train, ADMIN, [line(weight=0)], adapter="tools")
    assert dropped(frozen(log, renderer, tmp_path)) == {"unweighted": 1}


def test_a_correction_keeps_what_was_served_as_the_worse_half_of_a_pair(
    log: Log, renderer: Renderer, tmp_path: Path
) -> None:
    mine = renderer.identity
    digests = {"template_digest": mine.template_digest, "tokenizer_digest": mine.tokenizer_digest}
    asked = chat_request({"messages": [user(question(1))], "tools": [TOOL]})
    served = renderer.answer(asked, assistant("Hm."))
    answers = (Answer(assistant("Hm."), "stop", served.answer_ids),)
    log.teach(1, prompt_token_ids=served.prompt_ids, answers=answers, **digests)
    log.teach(2)
    same = log.ask(question(3), weather("X"))
    log.judge(same, correction=weather("X"))
    rows = list(frozen(log, renderer, tmp_path).train())
    assert [row.rejected_ids for row in rows] == [served.answer_ids, None, None]


def test_logged_token_ids_are_taken_as_they_are(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    """Also where the template would say something else by now: it tells the date, say."""
    mine = renderer.identity
    end = renderer.tokenizer.eos_token_id
    digests = {"template_digest": mine.template_digest, "tokenizer_digest": mine.tokenizer_digest}
    record = log.ask(
        question(1), answers=(Answer(assistant("A"), "stop", [40, end]),), prompt_token_ids=[9, 8, 7], **digests
    )
    log.judge(record, score=1.0)
    (row,) = frozen(log, renderer, tmp_path).train()
    assert (row.prompt_ids, row.answer_ids) == ([9, 8, 7], [40, end])


def test_a_deleted_trace_ends_the_snapshot_and_is_not_in_the_next(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    gone, stays = log.teach(1), log.teach(2)
    snapshot = frozen(log, renderer, tmp_path)
    assert snapshot.check_deleted(log.database) == []
    TraceDeletion(log.database).delete(ADMIN, TraceFilter(trace_id=gone.id))
    assert snapshot.check_deleted(log.database) == [gone.id]
    following = frozen(log, renderer, tmp_path)
    assert list(following.manifest.traces["train"]) == [stays.id]
    assert [one.digest for one in erase_deleted(tmp_path, "tools", log.database)] == [snapshot.digest]
    assert snapshots_of(tmp_path, "tools") == [following]
    assert snapshot.is_erased
    assert [path.name for path in snapshot.path.iterdir()] == ["manifest.json"]
    with pytest.raises(SnapshotError, match="was erased"):
        list(snapshot.train())
    assert [sighting.snapshot for sighting in Lineage(log.database).sightings(gone.id)] == [snapshot.digest]


def test_what_a_killed_process_leaves_is_invisible_and_removed(
    log: Log, renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.teach(1)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.dataset.freeze.settle", killed)
    with pytest.raises(KeyboardInterrupt):
        frozen(log, renderer, tmp_path)
    monkeypatch.undo()
    assert list((tmp_path / "tools").iterdir()) == []
    (tmp_path / "tools" / f"{PARTIAL}0").mkdir()
    assert snapshots_of(tmp_path, "tools") == []
    assert snapshots_of(tmp_path, "unknown") == []
    frozen(log, renderer, tmp_path)
    remove_partial(tmp_path / "tools")
    assert len(list((tmp_path / "tools").iterdir())) == 1


def replayed(log: Log, renderer: Renderer, root: Path, earlier: Snapshot, **selection: Any) -> Snapshot:
    chosen = Selection(adapter="tools", max_examples=1, **selection)
    return freeze(log.database, renderer, chosen, root, earlier=[earlier])


def test_examples_that_fell_out_of_the_budget_are_replayed(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    old = [log.teach(number) for number in range(3)]
    first = frozen(log, renderer, tmp_path)
    new = log.teach(9)
    second = replayed(log, renderer, tmp_path, first)
    assert [row.trace_id for row in second.train()] == [new.id]
    assert [row.id for row in second.replay()] == [f"replay:{one.id}:0" for one in old]
    assert list(second.manifest.traces["replay"]) == [one.id for one in old]
    fewer = replayed(log, renderer, tmp_path, first, max_replay=1)
    assert len(list(fewer.replay())) == 1
    assert dropped(fewer, "replay") == {"over_budget": 2}
    third = replayed(log, renderer, tmp_path, second)  # replayed once more, and not twice marked
    assert [row.id for row in third.replay()] == [row.id for row in second.replay()]


def test_replay_forgets_the_deleted_the_corrected_and_the_held_out(
    log: Log, renderer: Renderer, tmp_path: Path
) -> None:
    deleted, corrected, aged = log.teach(1), log.teach(2), log.teach(3)
    first = frozen(log, renderer, tmp_path)
    TraceDeletion(log.database).delete(ADMIN, TraceFilter(trace_id=deleted.id))
    log.judge(corrected, correction=weather("Other"))
    TraceDeletion(log.database).delete_where([traces.c.id == aged.id], "size")
    # A held-out question that an older example nearly equals, also where only its row is left.
    log.judge(log.ask(question(3), side="held_out", tools=[]), score=1.0)
    log.teach(9)
    second = replayed(log, renderer, tmp_path, first)
    assert [decoded(renderer, row).count("Other") for row in second.replay()] == [1]
    assert dropped(second, "replay") == {"deleted": 1, "near_held_out": 1}


def test_labels_that_came_after_the_round_began_are_the_next_ones(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    """So that a round that was killed in its snapshot takes the same one when it is taken up."""
    log.teach(1)
    log.teach(2, side="held_out")
    with log.database.read() as connection:
        until = connection.scalar(select(func.max(feedback.c.seq)))
    before = frozen(log, renderer, tmp_path / "before")
    log.judge(log.ask(question(3)), score=1.0)  # newer traces are the caller's to leave out
    log.judge(log.ask(question(4), side="held_out"), score=1.0)
    selection = Selection(adapter="tools")
    after = freeze(log.database, renderer, selection, tmp_path / "after", until_feedback=until)
    assert [row.id for row in after.train()] == [row.id for row in before.train()]
    assert [row.id for row in after.held_out()] == [row.id for row in before.held_out()]
    assert len(list(frozen(log, renderer, tmp_path / "all").train())) == 2


def test_what_the_log_forgets_soon_is_left_out(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    records = [log.teach(number, side="held_out" if number % 2 else "train") for number in range(4)]
    first, last = (record.created_at for record in (records[0], records[-1]))
    selection = Selection(adapter="tools")
    assert len(list(freeze(log.database, renderer, selection, tmp_path, not_before=first).train())) == 2
    with pytest.raises(NothingToLearnError, match="expiring 2"):
        freeze(log.database, renderer, selection, tmp_path, not_before=last + timedelta(seconds=1))


def test_what_the_filters_left_out_is_not_replayed(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    first_asked = log.teach(1)
    flood = [log.teach(number, key_id="flood") for number in range(10, 16)]
    chosen = Selection(adapter="tools", min_key_examples=1)
    first = frozen(log, renderer, tmp_path)
    assert len(list(first.train())) == 7
    again = log.teach(1)
    second = freeze(log.database, renderer, chosen, tmp_path, earlier=[first])
    trained = [row.trace_id for row in second.train()]
    assert again.id in trained, "the newest of two that are equal"
    assert first_asked.id not in trained
    assert dropped(second)["key_share"] == len(flood) - 1
    assert list(second.replay()) == [], "neither the duplicate nor what was above the key's share"


def test_replay_skips_what_was_tokenized_otherwise(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(1)
    first = frozen(log, renderer, tmp_path)
    log.teach(2)
    other = Renderer(renderer.tokenizer, "{# another #}" + CHATML, "sha256:base")
    second = replayed(log, other, tmp_path, first)
    assert list(second.replay()) == []
    assert dropped(second, "replay") == {"other_template": 1}
