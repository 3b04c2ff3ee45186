"""Asks the server a round's questions, each once for each version, and remembers every answer.

Answers go to a file, one line each, as they come: what was answered is not asked again after a kill or a server's
restart. A torn last line is what a kill left; it is cut off. Answers are greedy, so asking again gives the same.
Not here: judging (gating.py).
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.serving.api import ServerApi
from finetune.serving.errors import RefusedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    request: Mapping[str, Any]
    """A chat request's body, without a model."""
    max_tokens: int
    scored_ids: Sequence[int] = ()
    """Prompt and expected answer, of which the last `num_scored` are scored."""
    num_scored: int = 0


REFUSED = "refused"
"""The finish reason of a question that the server does not take."""
BAD_REQUEST, NOT_FOUND = 400, 404
FOLLOW_WAITS = (0.5, 1.0, 2.0)
"""Seconds. A version was imported through one server of a registry; any other may be asked for it, and looks at the
registry every half second."""


@dataclass(frozen=True, slots=True)
class Answer:
    model: str
    id: str
    """The question's."""
    message: Mapping[str, Any]
    finish_reason: str | None
    token_loss: float | None
    """Mean nats a token of the expected answer; None: there was none to score."""


class Answers:
    """Those of one round, in its directory. Used by one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, str], Answer] = {}
        if path.exists():
            self._read()

    def get(self, model: str, question_id: str) -> Answer | None:
        return self._known.get((model, question_id))

    def of(self, model: str, question_id: str) -> Answer:
        """Of what was asked."""
        return self._known[model, question_id]

    def add(self, answer: Answer) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(asdict(answer)).encode() + b"\n")
        self._known[answer.model, answer.id] = answer

    def _read(self) -> None:
        whole, newline, torn = self._path.read_bytes().rpartition(b"\n")
        if torn:
            with self._path.open("r+b") as file:
                file.truncate(len(whole) + len(newline))
        for line in whole.splitlines():
            answer = Answer(**json.loads(line))
            self._known[answer.model, answer.id] = answer


def ask_all(
    api: ServerApi,
    answers: Answers,
    questions: Sequence[Question],
    models: Sequence[str],
    *,
    concurrency: int,
    check: Callable[[], None],
    progress: Callable[[int, int], None] = lambda num_done, num_in_all: None,
) -> None:
    """Until every model has answered every question. `check` may raise, after each answer. Raises ServerDownError."""
    todo = [(model, one) for one in questions for model in models if answers.get(model, one.id) is None]
    todo.reverse()
    num_in_all = len(questions) * len(models)
    num_done = num_in_all - len(todo)
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="ask")
    running: set[Future[Answer]] = set()
    try:
        while todo or running:
            while todo and len(running) < concurrency:
                running.add(pool.submit(_ask, api, *todo.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                answers.add(future.result())
                num_done += 1
            progress(num_done, num_in_all)
            check()
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(api: ServerApi, model: str, question: Question) -> Answer:
    waits = iter(FOLLOW_WAITS)
    while True:
        try:
            return _asked_once(api, model, question)
        except RefusedError as error:
            if error.status == BAD_REQUEST:
                # This one question, of all versions: no room for an answer, or imported and never served.
                logger.warning("%s is left out: %s", question.id, error)
                return Answer(model, question.id, {"role": "assistant", "content": None}, REFUSED, None)
            wait = next(waits, None)
            if error.status != NOT_FOUND or wait is None:
                raise
            time.sleep(wait)


def _asked_once(api: ServerApi, model: str, question: Question) -> Answer:
    said = api.answer(model, question.request, max_tokens=question.max_tokens)
    loss = None
    if question.num_scored:
        losses = api.token_losses(model, question.scored_ids, question.num_scored)
        loss = sum(losses) / len(losses)
    return Answer(model, question.id, said["message"], said["finish_reason"], loss)
