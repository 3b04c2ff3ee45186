"""What a version makes of the base's general abilities: asked through the server, the answers to a committed list.

The form of an answer (a word, a number, a list) shows whether an instruction is still followed; the perplexity of the
base's own answers shows how far the version has moved from them. The base's answers are greedy, so every round measures
by the same ones. The general set that is trained on comes from here too: the base's answers to other prompts, some with
tools of the training data offered that fit none of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.dataset.errors import UnrenderableError
from finetune.dataset.general import MAX_ANSWER_TOKENS, GeneralRequest, general_requests, general_row
from finetune.dataset.prompts import RegressionPrompt, has_form
from finetune.dataset.render import Renderer, chat_request
from finetune.dataset.rows import ExampleRow
from finetune.gate.results import RegressionScore
from finetune.rounds.asking import Answer, Answers, Question, ask_all
from finetune.rounds.engine import Task
from finetune.rounds.errors import RoundError
from finetune.serving.api import ServerApi


def regression_scores(
    task: Task,
    api: ServerApi,
    models: tuple[str, str],
    renderer: Renderer,
    prompts: Sequence[RegressionPrompt],
    *,
    concurrency: int,
) -> tuple[RegressionScore, RegressionScore]:
    """Raises RefusedError, ServerDownError."""
    answers = Answers(task.folder / "regression.jsonl")
    base = api.base_name()
    asked = [
        Question(f"base:{number}", {"messages": [{"role": "user", "content": prompt.text}]}, MAX_ANSWER_TOKENS)
        for number, prompt in enumerate(prompts)
    ]
    ask_all(api, answers, asked, [base], concurrency=concurrency, check=task.check)
    scored = [_scored(renderer, question, answers.of(base, question.id), n) for n, question in enumerate(asked)]
    ask_all(api, answers, scored, models, concurrency=concurrency, check=task.check)
    ours, theirs = (_score(answers, model, scored, prompts) for model in models)
    return ours, theirs


def _scored(renderer: Renderer, question: Question, answer: Answer, number: int) -> Question:
    """What is asked of every version: the prompt, and the base's answer to be scored, if it can be rendered."""
    name = f"scored:{number}"
    try:
        rendered = renderer.answer(chat_request(question.request), answer.message)
    except UnrenderableError:
        return Question(name, question.request, question.max_tokens)
    # An answer that was cut by its limit did not end there.
    num_scored = len(rendered.answer_ids) - (answer.finish_reason == "length")
    ids = [*rendered.prompt_ids, *rendered.answer_ids[:num_scored]]
    return Question(name, question.request, question.max_tokens, ids, num_scored)


def _score(
    answers: Answers, model: str, questions: Sequence[Question], prompts: Sequence[RegressionPrompt]
) -> RegressionScore:
    """Every prompt counts alike, however long its answer is."""
    found = [answers.of(model, question.id) for question in questions]
    losses = [answer.token_loss for answer in found if answer.token_loss is not None]
    num_kept = sum(
        has_form(answer.message.get("content") or "", prompt.form)
        for answer, prompt in zip(found, prompts, strict=True)
    )
    if not losses:
        raise RoundError("none of the base's answers to the regression prompts can be rendered, so nothing is scored")
    return RegressionScore(math.exp(sum(losses) / len(losses)), num_kept / len(prompts), len(prompts))


def general_examples(
    task: Task,
    api: ServerApi,
    renderer: Renderer,
    prompts: Sequence[str],
    tool_sets: Sequence[Sequence[Mapping[str, Any]]],
    *,
    seed: int,
    concurrency: int,
) -> Iterator[ExampleRow]:
    """Raises RefusedError, ServerDownError."""
    requests = general_requests(prompts, tool_sets, seed=seed)
    answers = Answers(task.folder / "general.jsonl")
    base = api.base_name()
    questions = [Question(one.name, _body(one), MAX_ANSWER_TOKENS) for one in requests]
    ask_all(api, answers, questions, [base], concurrency=concurrency, check=task.check, progress=task.progress)
    for request in requests:
        answer = answers.of(base, request.name)
        row = general_row(renderer, request, {"message": answer.message, "finish_reason": answer.finish_reason})
        if row is not None:
            yield row


def _body(request: GeneralRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": list(request.messages)}
    return body | ({"tools": list(request.tools)} if request.tools else {})
