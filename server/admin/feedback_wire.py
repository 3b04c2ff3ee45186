"""What callers send as feedback: JSON bodies, checked strictly. What a value may be is also checked below the wire
(server/traces/feedback.py), for callers that do not come by HTTP."""

from typing import Any

from pydantic import Field, model_validator

from server.errors import InvalidRequestError
from server.openai.protocol.common import WireModel, invalid
from server.traces.feedback import MAX_BATCH, MAX_COMMENT_LENGTH, Feedback, Source, Target
from server.traces.tables import MAX_NAME_LENGTH


class FeedbackRequest(WireModel):
    source: Source = Field(description="how it arose")
    score: float | None = Field(None, ge=0, le=1, description="0 (wrong) to 1 (right)")
    correction: dict[str, Any] | None = Field(
        None, description="the assistant message that should have been the answer; not for an episode"
    )
    label: str | None = Field(None, min_length=1, max_length=MAX_NAME_LENGTH)
    comment: str | None = Field(None, min_length=1, max_length=MAX_COMMENT_LENGTH)
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=MAX_NAME_LENGTH, description="also as the header Idempotency-Key"
    )

    def feedback(self, header_key: str | None) -> Feedback:
        """Raises InvalidRequestError when the header and the body disagree."""
        if self.idempotency_key is not None and header_key not in (None, self.idempotency_key):
            raise InvalidRequestError(
                "The header Idempotency-Key and 'idempotency_key' differ.",
                param="idempotency_key",
                code="invalid_value",
            )
        return _feedback(self, self.idempotency_key or header_key)


class FeedbackItem(FeedbackRequest):
    trace_id: str | None = None
    response_id: str | None = None
    episode_id: str | None = Field(None, description="ours, or your own name for it")

    @model_validator(mode="after")
    def _one_target(self) -> "FeedbackItem":
        if sum(name is not None for name in (self.trace_id, self.response_id, self.episode_id)) != 1:
            raise invalid("give one of 'trace_id', 'response_id' and 'episode_id'", param="trace_id")
        return self

    @property
    def target(self) -> Target:
        if self.trace_id is not None:
            return Target("trace", self.trace_id)
        if self.response_id is not None:
            return Target("response", self.response_id)
        return Target("episode", self.episode_id or "")


class FeedbackBatch(WireModel):
    items: list[FeedbackItem] = Field(min_length=1, max_length=MAX_BATCH, description="taken all or none")

    def feedback(self, header_key: str | None) -> list[tuple[Target, Feedback]]:
        """The header's key is the key of those that have none, with the item's number behind it."""
        return [
            (item.target, _feedback(item, item.idempotency_key or (header_key and f"{header_key}[{index}]")))
            for index, item in enumerate(self.items)
        ]


def _feedback(request: FeedbackRequest, key: str | None) -> Feedback:
    return Feedback(
        source=request.source,
        score=request.score,
        correction=request.correction,
        label=request.label,
        comment=request.comment,
        idempotency_key=key,
    )


FEEDBACK_REQUESTS: tuple[type[WireModel], ...] = (FeedbackRequest, FeedbackBatch)
"""For the OpenAPI document."""
