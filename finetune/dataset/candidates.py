"""From one logged trace to the rows of a snapshot: filtered, rendered, measured, compared.

Where the server logged token ids with this very template and tokenizer, they are taken as they are; everything else is
rendered (render.py). What cannot be used comes back as the reason.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

from finetune.dataset.errors import UnrenderableError
from finetune.dataset.filters import (
    Drop,
    Target,
    canonical_answer,
    held_out_target,
    question_text,
    rejected_answer,
    train_targets,
)
from finetune.dataset.near import NearTexts, normalized
from finetune.dataset.render import Rendered, Renderer, chat_request
from finetune.dataset.rows import ExampleRow, HeldOutRow, Kind, class_digits
from finetune.dataset.snapshot import Selection
from finetune.dataset.source import LoggedTrace
from server.traces.feedback import Feedback


class Candidates:
    def __init__(self, renderer: Renderer, selection: Selection, *, not_before: datetime | None = None) -> None:
        """`not_before`: older traces are left out, whatever they are."""
        self.renderer = renderer
        self.selection = selection
        self._not_before = not_before

    def question(self, trace: LoggedTrace) -> str:
        return normalized(question_text(trace.request.get("messages") or ()))

    def examples(self, trace: LoggedTrace, near: NearTexts, seen: set[bytes]) -> list[ExampleRow] | Drop:
        """`near`: held-out questions. `seen`: prompt and answer of the examples before, added to; newer ones stay."""
        chosen = self.selection
        if self._is_expiring(trace):
            return Drop.EXPIRING
        targets = train_targets(
            trace,
            min_score=chosen.min_score,
            keep_unlabelled=chosen.keep_unlabelled,
            all_import_turns=chosen.all_import_turns,
        )
        if isinstance(targets, Drop):
            return targets
        question = self.question(trace)
        if question and near.has(question):
            return Drop.NEAR_HELD_OUT
        rows: list[ExampleRow] = []
        reason = Drop.DUPLICATE
        for target in targets:
            rendered = self._render(trace, target)
            if isinstance(rendered, Drop):
                reason = rendered
                continue
            said = _digest(rendered, target)
            if said not in seen:
                seen.add(said)
                rows.append(self._example(trace, target, rendered, question))
        return rows or reason

    def held_out(self, trace: LoggedTrace) -> HeldOutRow | Drop:
        target = Drop.EXPIRING if self._is_expiring(trace) else held_out_target(trace)
        if isinstance(target, Drop):
            return target
        rendered = self._render(trace, target)
        if isinstance(rendered, Drop):
            return rendered
        return HeldOutRow(
            id=trace.id,
            seq=trace.seq,
            created_at=trace.created_at.isoformat(),
            cluster=trace.group,
            kind=_kind(trace.request, target.message),
            request=dict(trace.request),
            target=dict(target.message),
            origin=target.origin,
            source=target.source,
            is_audit=trace.is_audit,
            feedback=[_told(one) for one in (*trace.episode_feedback, *trace.feedback)],
            served=dict(trace.answers[0]["message"]) if trace.answers and trace.endpoint == "chat" else None,
            version=trace.version,
            question=self.question(trace),
            prompt_ids=rendered.prompt_ids,
            answer_ids=rendered.answer_ids,
            classes=class_digits(rendered.classes),
            key_id=trace.key_id,
        )

    def _is_expiring(self, trace: LoggedTrace) -> bool:
        return self._not_before is not None and trace.created_at < self._not_before

    def _example(self, trace: LoggedTrace, target: Target, rendered: Rendered, question: str) -> ExampleRow:
        rejected = self._rejected(trace, target)
        return ExampleRow(
            id=f"{trace.id}:{target.turn}",
            seq=trace.seq,
            cluster=trace.group,
            kind=_kind(trace.request, target.message),
            origin=target.origin,
            source=target.source,
            question=question,
            tools=[tool["function"]["name"] for tool in trace.request.get("tools") or ()],
            prompt_ids=rendered.prompt_ids,
            answer_ids=rendered.answer_ids,
            classes=class_digits(rendered.classes),
            rejected_ids=rejected,
        )

    def _render(self, trace: LoggedTrace, target: Target) -> Rendered | Drop:
        try:
            request = chat_request(_before(trace.request, target))
            logged = self._logged_prompt(trace)
            rendered = None
            if target.origin == "served" and logged is not None and trace.completion_ids:
                rendered = self.renderer.served(request, logged, trace.completion_ids[0])
            if rendered is None:
                rendered = self.renderer.answer(request, target.message)
                if logged is not None:  # the very tokens, also where a template tells the date
                    rendered = Rendered(list(logged), rendered.answer_ids, rendered.classes)
        except UnrenderableError:
            return Drop.UNRENDERABLE
        fits = len(rendered.prompt_ids) + len(rendered.answer_ids) <= self.selection.max_tokens
        return rendered if fits else Drop.TOO_LONG

    def _rejected(self, trace: LoggedTrace, target: Target) -> list[int] | None:
        if rejected_answer(trace, target) is None or self._logged_prompt(trace) is None or not trace.completion_ids:
            return None
        request = chat_request(trace.request)
        served = self.renderer.served(request, (), trace.completion_ids[0])
        return None if served is None else served.answer_ids

    def _logged_prompt(self, trace: LoggedTrace) -> list[int] | None:
        mine = self.renderer.identity
        is_same = (trace.template_digest, trace.tokenizer_digest) == (mine.template_digest, mine.tokenizer_digest)
        return list(trace.prompt_ids) if trace.prompt_ids and is_same else None


def _before(request: Mapping[str, Any], target: Target) -> dict[str, Any]:
    return {**request, "messages": list(request["messages"])[: target.num_messages]}


def _told(given: Feedback) -> dict[str, Any]:
    told = {"source": given.source, "score": given.score, "correction": given.correction}
    return told | {"label": given.label, "comment": given.comment}


def _kind(request: Mapping[str, Any], answer: Mapping[str, Any]) -> Kind:
    if answer.get("tool_calls"):
        return "call"
    return "no_call" if request.get("tools") else "chat"


def _digest(rendered: Rendered, target: Target) -> bytes:
    said = np.asarray(rendered.prompt_ids, "<i4").tobytes() + b"\n" + canonical_answer(target.message).encode()
    return hashlib.blake2b(said, digest_size=16).digest()
