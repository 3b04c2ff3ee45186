"""The demonstration's traffic: which requests there are, what is right for each, and sending them.

Questions of the Berkeley Function Calling Leaderboard, some of them again with tools that do not fit, and ordinary
chat with tools present. All requests of one connected group of questions (equal or nearly equal text) go into one named
episode: an episode is on one side of the server's split, so no group is ever on both. What is right is posted as
feedback of source `known_answer`; which third stays untouched is the server's draw, never ours.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from finetune.dataset.bfcl import NoCall, Question, chats, misfits
from finetune.serving.api import ServerApi
from finetune.serving.http import Http

MAX_ANSWER_TOKENS = 24
"""Of an answer to the traffic: it will be corrected anyway, and the base rambles."""
MAX_CHAT_TOKENS = 96
NUM_SENDERS = 8
FEEDBACK_BATCH = 200
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and what is known about it."""

    name: str
    episode: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    correction: Mapping[str, Any] | None
    """The right assistant message; None: whatever the base says to it without tools (`with_base_answers`)."""
    accepted: Sequence[Any] | None
    """The leaderboard's accepted values of a call; None: no call is right."""

    @property
    def body(self) -> dict[str, Any]:
        return {"messages": list(self.messages), "tools": list(self.tools), "temperature": 0}


def call_requests(questions: Sequence[Question]) -> list[Asked]:
    return [
        Asked(one.id, _episode(one), one.messages, one.tools, one.answer, list(one.ground_truth)) for one in questions
    ]


def no_call_requests(
    questions: Sequence[Question], held_out: Collection[str], chat_prompts: Sequence[str], *, share: float, seed: int
) -> list[Asked]:
    """`held_out`: ids of the questions that the server has drawn to stay untouched. Tools come from questions of the
    same side, so that no tool of the other side is seen; those of ordinary chat are the training side's. `share`: of
    the questions that are also asked with tools that do not fit."""
    episodes = {one.id: _episode(one) for one in questions}
    sides = [[one for one in questions if (one.id in held_out) is side] for side in (False, True)]
    found = []
    for side in sides:
        strangers = misfits(side, seed=seed)
        found += [
            _no_call(one, episodes[one.id.removeprefix("misfit_")])
            for one in _drawn(strangers)[: round(share * len(strangers))]
        ]
    return found + [_no_call(one, one.id) for one in chats(chat_prompts, sides[0], seed=seed)]


def mixed(requests: Iterable[Asked]) -> list[Asked]:
    """In a drawn order."""
    return sorted(requests, key=lambda one: hashlib.blake2b(one.name.encode(), person=b"mixed").digest())


def _drawn(strangers: Sequence[NoCall]) -> list[NoCall]:
    return sorted(strangers, key=lambda one: hashlib.blake2b(one.id.encode(), person=b"misfits").digest())


def _episode(question: Question) -> str:
    return f"demo-{question.group}"


def _no_call(one: NoCall, episode: str) -> Asked:
    said = None if one.answer is None else {"role": "assistant", "content": one.answer}
    return Asked(one.id, episode, one.messages, one.tools, said, None)


def with_base_answers(api: ServerApi, requests: Sequence[Asked]) -> list[Asked]:
    """Corrections for ordinary chat: what the base says without tools, up to a sentence's end. A request to which it
    says no whole sentence is left out."""
    base = api.base_name()

    def complete(one: Asked) -> Asked | None:
        if one.correction is not None:
            return one
        answer = api.answer(base, {"messages": list(one.messages)}, max_tokens=MAX_CHAT_TOKENS)
        text = answer["message"]["content"] or ""
        if answer["finish_reason"] == "length":
            ends = [match.end() for match in _SENTENCE_END.finditer(text)]
            text = text[: ends[-1]] if ends else ""
        if not text.strip():
            return None
        return replace(one, correction={"role": "assistant", "content": text.strip()})

    with ThreadPoolExecutor(NUM_SENDERS) as pool:
        return [one for one in pool.map(complete, requests) if one is not None]


def send(
    http: Http, adapters: Mapping[str, Collection[str]], requests: Sequence[Asked], on_done: Callable[[], None]
) -> dict[str, dict[str, str]]:
    """`adapters`: of each the names of the requests it is asked; greedily and unconstrained. Returns the traces' ids by
    adapter and name. One question goes to all its adapters in a row: the base answers, and knows the prompt already."""

    def ask(one: Asked) -> list[tuple[str, str, str]]:
        found = []
        for adapter in (adapter for adapter, names in adapters.items() if one.name in names):
            body = one.body | {"model": adapter, "max_completion_tokens": MAX_ANSWER_TOKENS}
            headers = {"X-Sterna-Episode": f"{adapter}-{one.episode}"}
            reply = http.request("POST", "/v1/chat/completions", json=body, headers=headers)
            found.append((adapter, one.name, reply.headers["X-Sterna-Trace-Id"]))
        on_done()
        return found

    ids: dict[str, dict[str, str]] = {adapter: {} for adapter in adapters}
    with ThreadPoolExecutor(NUM_SENDERS) as pool:
        for adapter, name, trace_id in (one for found in pool.map(ask, requests) for one in found):
            ids[adapter][name] = trace_id
    return ids


def post_known_answers(http: Http, requests: Iterable[Asked], trace_ids: Mapping[str, str]) -> int:
    """Feedback on the traces; returns how many."""
    items = [_feedback(one, trace_ids[one.name]) for one in requests]
    for first in range(0, len(items), FEEDBACK_BATCH):
        http.request("POST", "/v1/feedback", json={"items": items[first : first + FEEDBACK_BATCH]})
    return len(items)


def _feedback(one: Asked, trace_id: str) -> dict[str, Any]:
    assert one.correction is not None, "with_base_answers comes first"
    item: dict[str, Any] = {"trace_id": trace_id, "source": "known_answer", "correction": dict(one.correction)}
    if one.accepted is not None:
        item["comment"] = json.dumps({"accepted": list(one.accepted)}, ensure_ascii=False)
    return item
