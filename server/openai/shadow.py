"""One request once more, for a shadow version: the same way as the live answer, into the trace log and nowhere else.

The run is an evaluation that names the version, as the gate would ask; the `metadata` of its trace says which trace it
shadows. It belongs to the same key and user, so that whatever deletes theirs finds it too.
"""

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from server.adapters.shadow import ShadowRunner
from server.adapters.version import Version
from server.openai.answer import Answer, Asked, Parts, answer_chat, answer_completion
from server.openai.notes import Notes
from server.openai.protocol.chat import ChatRequest

SHADOW_OF = "shadow_of"
"""Key in the trace's metadata; the value is the live trace's id."""


@dataclass(frozen=True, slots=True)
class ShadowJob:
    """A request whose live answer is complete."""

    asked: Asked
    version: Version
    trace_id: str
    """Of the live answer."""


def with_shadows(parts: Parts, is_busy: Callable[[], bool]) -> tuple[Parts, ShadowRunner[ShadowJob]]:
    """`parts` whose answers are also run on shadow versions, and what runs them."""

    async def run(job: ShadowJob) -> None:
        await _run(parts, job)  # these parts have no shadows: no shadow has one of its own

    runner = ShadowRunner(run, is_busy=is_busy, on_end=parts.metrics.count_shadow)

    def offer(asked: Asked, version: Version, trace_id: str) -> None:
        runner.offer(ShadowJob(asked, version, trace_id))

    return replace(parts, offer_shadow=offer), runner


async def _run(parts: Parts, job: ShadowJob) -> None:
    name = str(job.version.ref)
    asked = Asked(
        request=job.asked.request.model_copy(update={"model": name}),
        raw={
            **job.asked.raw,
            "model": name,
            "metadata": {**(job.asked.raw.get("metadata") or {}), SHADOW_OF: job.trace_id},
        },
        num_bytes=job.asked.num_bytes,
        caller=job.asked.caller,
        notes=Notes(purpose="evaluation"),
    )
    answer: Answer[Any] = (answer_chat if isinstance(asked.request, ChatRequest) else answer_completion)(parts, asked)
    async with aclosing(answer.chunks()) as chunks:
        async for _ in chunks:
            pass  # the trace has it
