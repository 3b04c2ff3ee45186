"""The committed prompts are of use and apart from each other; the base's answers become examples."""

from typing import Any

import httpx
import pytest

from finetune.dataset.errors import SnapshotError
from finetune.dataset.general import GeneralRequest, general_requests, general_row, recent_tool_sets
from finetune.dataset.near import NearTexts
from finetune.dataset.prompts import CHAT, GENERAL, REGRESSION, Form, has_form, read_prompts, read_regression_prompts
from finetune.dataset.render import Renderer
from tests.finetune.dataset.log import TOOL, Log, question
from tests.server.openai.harness import async_test, serving


def test_no_prompt_is_near_another_of_any_list() -> None:
    general, chat = read_prompts(GENERAL), read_prompts(CHAT)
    regression = [one.text for one in read_regression_prompts()]
    assert (len(general), len(chat), len(regression)) == (180, 60, 60)
    known = NearTexts()
    for text in (*general, *chat, *regression):
        # Short questions differ in one word ("Answer only with a number: how many ..."): those are not equal questions.
        assert not known.add(text) or text.startswith("Answer"), text
    assert len({*general, *chat, *regression}) == 300


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("word", "Green.", "The color of grass is green."),
        ("yes_no", "No, they do not.", "Fire is hot."),
        ("number", "Eight", "A spider has legs."),
        ("list", "1. Chess\n2. Golf\n3. Judo", "Chess, golf and judo."),
        ("text", "Rain smells of earth.", "Rain."),
        ("text", "It smells of wet earth.", '<tool_call>{"name": "smell"}</tool_call> as you asked me to'),
        ("word", "Green", " "),
    ],
)
def test_forms(form: Form, good: str, bad: str) -> None:
    assert has_form(good, form)
    assert not has_form(bad, form)


def test_a_line_without_a_form_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("text\tfine\nnonsense\tprompt\n")
    with pytest.raises(SnapshotError, match="'nonsense"):
        read_regression_prompts(path)
    assert len(read_regression_prompts(REGRESSION)) == 60


def test_some_prompts_are_asked_with_tools_and_the_same_ones_every_time() -> None:
    prompts = read_prompts()
    found = general_requests(prompts, [[TOOL]], seed=1)
    assert found == general_requests(prompts, [[TOOL]], seed=1)
    assert 60 <= sum(bool(one.tools) for one in found) <= 120
    assert not any(one.tools for one in general_requests(prompts, [], seed=1))
    assert len({one.name for one in found}) == 180


def test_tool_sets_are_the_newest_of_the_training_side(log: Log) -> None:
    other = TOOL | {"function": {"name": "other"}}
    log.ask(question(1), tools=[other])
    log.ask(question(2))
    log.ask(question(3))
    log.ask(question(4), tools=[other, TOOL], side="held_out")
    assert recent_tool_sets(log.database, "tools") == [[TOOL], [other]]
    assert recent_tool_sets(log.database, "tools", max_sets=1) == [[TOOL]]
    assert recent_tool_sets(log.database, "tools", until_seq=1) == [[other]]


def choice(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content} | message, "finish_reason": finish}


def test_answers_become_examples_and_attempts_at_calls_do_not(renderer: Renderer) -> None:
    asked = GeneralRequest("general:0", [{"role": "user", "content": "Why?"}], [TOOL])
    row = general_row(renderer, asked, choice("Because."))
    assert row is not None
    assert (row.id, row.seq, row.kind, row.origin, row.question) == ("general:0", 0, "no_call", "base", "why")
    assert renderer.tokenizer.decode(row.answer_ids, skip_special=False) == "Because.<|im_end|>"
    cut = general_row(renderer, asked, choice("Because it", "length"))
    assert cut is not None
    assert renderer.tokenizer.decode(cut.answer_ids, skip_special=False) == "Because it"
    assert len(cut.classes) == len(cut.answer_ids)
    assert general_row(renderer, asked, choice('<tool_call>{"name": "x"')) is None
    assert general_row(renderer, asked, choice("  ")) is None
    assert general_row(renderer, asked, choice("a<|im_end|>b")) is None


@async_test
async def test_the_base_is_asked_over_http_as_evaluation(renderer: Renderer) -> None:
    async with serving("Because it is so.") as served:
        answers = {}
        requests = general_requests(["Why is it so?", "What else?"], [], seed=0)
        for request in requests:
            body = {"model": "tiny", "messages": list(request.messages), "temperature": 0, "max_tokens": 160}
            response: httpx.Response = await served.http.post(
                "/v1/chat/completions", json=body, headers={"X-Sterna-Purpose": "evaluation"}
            )
            answers[request.messages[0]["content"]] = response.json()
    rows = [general_row(renderer, one, answers[one.messages[0]["content"]]["choices"][0]) for one in requests]
    assert [row.id for row in rows if row is not None] == ["general:0", "general:1"]
    assert rows[0] is not None
    assert rows[0].prompt_ids == served.engine.submitted[0].token_ids
