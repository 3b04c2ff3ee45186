"""Where the loss falls, and that the trainer's ids are those that were served."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from finetune.dataset.candidates import Candidates
from finetune.dataset.examples import example, preference, snapshot_lessons
from finetune.dataset.freeze import freeze
from finetune.dataset.near import NearTexts
from finetune.dataset.render import Renderer
from finetune.dataset.rows import ExampleRow
from finetune.dataset.snapshot import Selection
from finetune.dataset.source import LoggedTrace, read_by_seq
from finetune.dataset.token_classes import ClassWeights
from server.storage.database import Database
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.tables import traces
from server.traces.viewer import ADMIN
from tests.finetune.dataset.log import TOOL, Log, question
from tests.server.openai.harness import Harness, async_test, serving
from tests.server.openai.scripted import Answer
from tests.server.traces.builders import assistant, call, system, user

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def row(**changes: Any) -> ExampleRow:
    given: dict[str, Any] = {
        "id": "trace-1:0", "seq": 1, "cluster": "c", "kind": "call", "origin": "correction", "source": "known_answer",
        "question": "q", "tools": ["weather"], "prompt_ids": [1, 2, 3], "answer_ids": [4, 5, 6], "classes": "054",
    }  # fmt: skip
    return ExampleRow(**(given | changes))


def test_loss_falls_on_the_answer_alone_by_class() -> None:
    plain = example(row())
    assert plain.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert plain.weights.tolist() == [0, 0, 0, 1, 1, 1]
    assert (plain.token_ids.dtype, plain.weights.dtype, plain.kl) == (np.int32, np.float32, False)
    weighted = example(row(), ClassWeights(structure=0.5, tool_name=4, argument_value=2))
    assert weighted.weights.tolist() == [0, 0, 0, 0.5, 4, 2]


def test_a_pair_is_the_prompt_with_either_answer() -> None:
    given = row(rejected_ids=[7, 8])
    pair = preference(given, example(given))
    assert (pair.chosen.id, pair.prompt_length) == ("trace-1:0", 3)
    assert (pair.chosen.token_ids.tolist(), pair.rejected_ids.tolist()) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8])


def test_general_examples_are_trained_with_kl(log: Log, renderer: Renderer, tmp_path: Path) -> None:
    log.teach(1)
    general = row(id="general:0", seq=0, kind="chat", origin="base", tools=[], classes="111")
    snapshot = freeze(log.database, renderer, Selection(adapter="tools"), tmp_path, general=[general])
    lessons = snapshot_lessons(snapshot, with_pairs=True)
    found = lessons.examples
    assert lessons.pairs == []
    assert [one.kl for one in found] == [False, True]
    assert found[1].id == "general:0"
    assert found[0].weights[[0, -1]].tolist() == [0, 1]
    assert list(snapshot.manifest.traces["general"]) == []


async def chat(served: Harness, messages: list[Any]) -> dict[str, Any]:
    response = await served.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "tools": [TOOL]})
    assert response.status_code == 200
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def logged(database: Database) -> list[LoggedTrace]:
    with database.read() as connection:
        seqs = connection.scalars(select(traces.c.seq).order_by(traces.c.seq)).all()
    found = read_by_seq(database, seqs)
    return [found[seq] for seq in seqs]


def rows_of(renderer: Renderer, found: list[LoggedTrace]) -> list[ExampleRow]:
    candidates = Candidates(renderer, Selection(adapter="tools", keep_unlabelled=True))
    rows = [candidates.examples(trace, NearTexts(), set()) for trace in found]
    assert all(isinstance(one, list) for one in rows)
    return [one[0] for one in rows]  # type: ignore[index]


@pytest.mark.parametrize("uses_logged", [True, False])
@async_test
async def test_trainer_ids_are_served_ids_over_a_tool_history(renderer: Renderer, uses_logged: bool) -> None:
    """Two turns through the HTTP API: what the engine got and generated is, token for token, what is trained on; also
    rendered anew from the messages in the log."""
    said = iter([CALL, "It is 12 °C in Zürich."])
    async with serving(lambda token_ids, params: Answer(next(said))) as served:
        history = [system("Be brief."), user("Weather in Zürich?")]
        first = await chat(served, history)
        made = first["tool_calls"][0]["id"]
        await chat(served, [*history, first, {"role": "tool", "tool_call_id": made, "content": '{"celsius": 12}'}])
        found = logged(served.records.database)
        end = renderer.tokenizer.eos_token_id
        expected = [
            (one.token_ids, [*renderer.tokenizer.encode(text, add_special=False, parse_special=False), end])
            for one, text in zip(served.engine.submitted, (CALL, "It is 12 °C in Zürich."), strict=True)
        ]
    if uses_logged:
        mine = renderer.identity
        found = [
            replace(trace, template_digest=mine.template_digest, tokenizer_digest=mine.tokenizer_digest)
            for trace in found
        ]
    assert [(list(one.prompt_ids), list(one.answer_ids)) for one in rows_of(renderer, found)] == expected


@async_test
async def test_a_corrected_answer_is_what_the_model_would_have_had_to_generate(renderer: Renderer) -> None:
    """The rendered correction, generated by the engine, comes back over HTTP as the correction."""
    right = assistant("Let me see.", call("weather", '{"city": "Bern", "days": [1, 2.5, null]}'))
    async with serving("I do not know.") as served:
        await chat(served, [user(question(1))])
        (trace,) = logged(served.records.database)
        FeedbackStore(served.records.database).add(
            ADMIN, Target("trace", trace.id), Feedback(source="known_answer", correction=right)
        )
        (row,) = rows_of(renderer, logged(served.records.database))
        assert list(row.prompt_ids) == served.engine.submitted[0].token_ids
    assert row.origin == "correction"
    text = renderer.tokenizer.decode(row.answer_ids)
    async with serving(text) as served:
        message = await chat(served, [user(question(1))])
    assert message["content"] == "Let me see."
    (made,) = message["tool_calls"]
    assert made["function"] == right["tool_calls"][0]["function"]
