"""One choice of a chat answer: engine outputs in, wire choices out.

Text goes through the reasoning splitter and, when tools are offered, the tool-call parser; what one engine output
made certain becomes one wire choice, so a step costs one chunk. The first chunk of a choice carries the role. Log-
probabilities of tokens whose text is still held back go with the next chunk.
"""

from collections.abc import Sequence

from server.backends.text_pipe import TextPipe
from server.backends.token_text import TokenTexts
from server.engine.params import EngineOutput
from server.engine.stream import split_output
from server.openai.protocol.chunks import ChatChoice, ChatDelta, ChatLogprobs, ToolCallDelta
from server.openai.protocol.chunks import TokenLogprob as WireLogprob
from server.tools.parser import ContentDelta, Event, ToolCallParser, ToolCallStart
from server.tools.reasoning import ReasoningDelta, ReasoningSplitter


class ChatChoiceState:
    """`texts` is given when log-probabilities were asked for, `parser` when tools are offered."""

    def __init__(
        self,
        index: int,
        pipe: TextPipe,
        splitter: ReasoningSplitter,
        parser: ToolCallParser | None,
        texts: TokenTexts | None,
    ) -> None:
        self.index = index
        self.pipe = pipe
        self.is_finished = False
        self._splitter = splitter
        self._parser = parser
        self._texts = texts
        self._has_begun = False
        self._logprobs: list[WireLogprob] = []

    def push(self, output: EngineOutput) -> list[ChatChoice]:
        """What this output adds; the last choice has the finish reason and then `is_finished` is set."""
        if self._parser is None or not self._parser.may_end_early:
            return self._push(output)
        # Token by token, so that the usage does not depend on how many came together with the call's end.
        choices: list[ChatChoice] = []
        for one in split_output(output):
            choices += self._push(one)
            if self.is_finished:
                break
        return choices

    def _push(self, output: EngineOutput) -> list[ChatChoice]:
        choices: list[ChatChoice] = []
        if not self._has_begun:
            self._has_begun = True
            role: ChatDelta = {"role": "assistant", "content": "", "refusal": None}
            choices.append({"index": self.index, "delta": role, "logprobs": None, "finish_reason": None})
        text, entries = self.pipe.push(output)
        if self._texts is not None:
            self._logprobs.extend(self._texts.wire(entry) for _, entry in entries)
        reason = self.pipe.finish_reason
        delta = self._delta(text, is_end=reason is not None)
        if delta:
            choices.append({"index": self.index, "delta": delta, "logprobs": self._take(), "finish_reason": None})
        num_calls = self._parser.num_calls if self._parser else 0
        if self._parser is not None and self._parser.done and num_calls and reason is None:
            reason = "stop"  # only one call was allowed and it is complete
        if reason is not None:
            self.is_finished = True
            wire_reason = "tool_calls" if num_calls and reason == "stop" else reason
            choices.append({"index": self.index, "delta": {}, "logprobs": self._take(), "finish_reason": wire_reason})
        return choices

    def _take(self) -> ChatLogprobs | None:
        if self._texts is None or not self._logprobs:
            return None
        taken, self._logprobs = self._logprobs, []
        return {"content": taken, "refusal": None}

    def _delta(self, text: str, *, is_end: bool) -> ChatDelta:
        pieces = self._splitter.push(text) if text else []
        if is_end:
            pieces.extend(self._splitter.finish())
        if not pieces and not is_end:
            return {}
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
        content = "".join(piece.text for piece in pieces if isinstance(piece, ContentDelta))
        delta: ChatDelta = {}
        if self._parser is not None:
            events = self._parser.push(content) if content else []
            if is_end:
                events.extend(self._parser.finish())
            content, calls = _collect(events)
            if calls:
                delta["tool_calls"] = calls
        if reasoning:
            delta["reasoning_content"] = reasoning
        if content:
            delta["content"] = content
        return delta


def _collect(events: Sequence[Event]) -> tuple[str, list[ToolCallDelta]]:
    """Join what belongs together: one content string, and one delta for each call that is named."""
    content: list[str] = []
    calls: dict[int, ToolCallDelta] = {}
    for event in events:
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ToolCallStart):
            calls[event.index] = {
                "index": event.index,
                "id": event.id,
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
        else:
            call = calls.setdefault(event.index, {"index": event.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += event.text
    return "".join(content), list(calls.values())
