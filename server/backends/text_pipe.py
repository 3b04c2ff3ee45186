"""One choice's way from tokens to certain text: detokenizer, stop strings, and the log-probabilities beside the text.

Everything here is synchronous: it runs for every token of every stream. Text is handed on only when it can no longer
turn out to be part of a stop string or of a torn character; log-probabilities follow the text they belong to, so
tokens cut off by a stop string disappear from both. An end-of-generation token is counted but never shown.
"""

from collections.abc import Sequence
from typing import Literal

from server.engine.params import EngineOutput, TokenLogprob
from server.errors import ServerUnavailableError
from server.text.detokenizer import Detokenizer
from server.tools.stop import StopMatcher

FinishReason = Literal["stop", "length"]


class TextPipe:
    """Feed it every EngineOutput of one sequence until `finish_reason` is set."""

    def __init__(self, detokenizer: Detokenizer, stop_strings: Sequence[str]) -> None:
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        """Sampled up to the end, the end-of-generation token included."""
        self.num_cached_tokens = 0
        """Prompt tokens that the prefix cache had when the sequence began."""
        self._sum_logprobs = 0.0
        self._num_logprobs = 0
        self._has_begun = False
        self._detokenizer = detokenizer
        self._stop = StopMatcher(stop_strings) if stop_strings else None
        self._num_read = 0  # characters that the detokenizer gave
        self._num_certain = 0  # characters handed on
        self._pending: list[tuple[int, TokenLogprob]] = []

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def mean_logprob(self) -> float:
        """Over the answer's tokens, when log-probabilities were asked for; what `best_of` ranks by."""
        return self._sum_logprobs / max(self._num_logprobs, 1)

    def push(self, output: EngineOutput) -> tuple[str, list[tuple[int, TokenLogprob]]]:
        """Returns text that became certain, and (offset of the token's text in the answer, log-probability) pairs."""
        if not self._has_begun:
            self._has_begun = True
            self.num_cached_tokens = output.num_cached_tokens
        token_ids = output.token_ids
        self.token_ids += token_ids
        if output.stop_token_id is not None:
            token_ids = token_ids[:-1]
        if output.logprobs is not None or self._stop is not None:
            text = self._push_each(token_ids, output)
        else:
            text = self._detokenizer.push(token_ids)
        if output.finish_reason is not None and self.finish_reason is None:
            text += self._end(output)
        self._num_certain += len(text)
        return text, self._release()

    def _push_each(self, token_ids: Sequence[int], output: EngineOutput) -> str:
        """Token by token, so that neither the answer nor the usage depends on how many tokens came together."""
        parts: list[str] = []
        for index, token_id in enumerate(token_ids):
            if output.logprobs is not None:
                entry = output.logprobs[index]
                self._pending.append((self._num_read, entry))
                self._sum_logprobs += entry.logprob
                self._num_logprobs += 1
            piece = self._detokenizer.push((token_id,))
            self._num_read += len(piece)
            if self._stop is not None:
                piece, stopped_by = self._stop.push(piece)
                if stopped_by is not None:
                    self.finish_reason = "stop"
                    del self.token_ids[len(self.token_ids) - (len(output.token_ids) - index - 1) :]
                    parts.append(piece)
                    break
            parts.append(piece)
        return "".join(parts)

    def _end(self, output: EngineOutput) -> str:
        """What the detokenizer and the stop matcher still hold."""
        if output.finish_reason == "error":
            raise ServerUnavailableError(output.error or "the engine failed to compute this answer")
        if output.finish_reason == "cancelled":
            raise ServerUnavailableError(output.error or "the server stopped before this answer was complete")
        self.finish_reason = output.finish_reason
        rest = self._detokenizer.flush()
        self._num_read += len(rest)
        if self._stop is None:
            return rest
        certain, stopped_by = self._stop.push(rest)
        if stopped_by is not None:
            self.finish_reason = "stop"
            return certain
        return certain + self._stop.flush()

    def _release(self) -> list[tuple[int, TokenLogprob]]:
        """Log-probabilities whose text has been handed on; at an end without a stop string, all of them."""
        if not self._pending:
            return []
        pending = self._pending
        stopped = self._stop is not None and self._stop.stopped_by is not None
        if self.finish_reason is not None and not stopped:
            self._pending = []
            return pending
        count = 0
        while count < len(pending) and pending[count][0] < self._num_certain:
            count += 1
        self._pending = [] if stopped else pending[count:]
        return pending[:count]
