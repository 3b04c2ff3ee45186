"""Fills a log for the dataset tests: questions with tools, asked on a side of the split that the test chooses."""

from dataclasses import dataclass, field
from typing import Any

from server.storage.database import Database
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.record import Answer, TraceRecord
from server.traces.store import TraceStore
from server.traces.viewer import ADMIN
from tests.server.traces.builders import Client, Message, assistant, call, user

TOOL: Message = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "marsh")


def question(number: int) -> str:
    """Far from every other one."""
    return " ".join(WORDS[(number * step + step) % len(WORDS)] + str(number * step) for step in range(1, 7))


def weather(city: str) -> Message:
    return assistant(None, call("weather", f'{{"city": "{city}"}}'))


@dataclass
class Log:
    train: TraceStore
    held_out: TraceStore
    feedback: FeedbackStore = field(init=False)
    clients: dict[str, Client] = field(init=False)

    def __post_init__(self) -> None:
        self.feedback = FeedbackStore(self.database)
        self.clients = {"train": Client(self.train), "held_out": Client(self.held_out)}

    @property
    def database(self) -> Database:
        return self.train.database

    def ask(
        self,
        text: str,
        answer: Message | None = None,
        *,
        side: str = "train",
        finish: str = "stop",
        num_answers: int = 1,
        **changes: Any,
    ) -> TraceRecord:
        """One trace of the adapter `tools`, in an episode of its own; its logged token ids are not to be used."""
        given = answer or assistant("Hm.")
        answers = (Answer(given, finish, [5, 6, 7]),) * num_answers
        asked = {"adapter": "tools", "tools": [TOOL], "answers": answers} | changes
        return self.clients[side].ask(asked.pop("messages", [user(text)]), given, **asked)

    def judge(self, record: TraceRecord, source: str = "known_answer", **given: Any) -> None:
        self.feedback.add(ADMIN, Target("trace", record.id), Feedback(source=source, **given))  # type: ignore[arg-type]

    def teach(self, number: int, *, side: str = "train", **changes: Any) -> TraceRecord:
        """A question whose known answer is a call."""
        record = self.ask(question(number), side=side, **changes)
        self.judge(record, score=0.0, correction=weather(f"City {number}"))
        return record
