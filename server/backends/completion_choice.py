"""One choice of a completion: engine outputs in, wire choices out, with `echo` and the legacy log-probabilities.

`text_offset` counts characters of this choice's `text`. The first prompt token has no log-probability (nothing comes
before it); its entry is 0.0 with no alternatives, because the `openai` package's models admit no null there.
"""

from collections.abc import Sequence

from server.backends.text_pipe import TextPipe
from server.backends.token_text import TokenTexts, finite
from server.engine.params import EngineOutput, TokenLogprob
from server.openai.protocol.chunks import CompletionChoice, CompletionLogprobs
from server.text.detokenizer import Detokenizer


class Echo:
    """The prompt, to be repeated in front of the answer; `detokenizer` (fresh) finds each token's place in it."""

    def __init__(self, text: str, token_ids: Sequence[int], detokenizer: Detokenizer) -> None:
        self.text = text
        self.token_ids = token_ids
        self._detokenizer = detokenizer

    def offsets(self) -> list[int]:
        offsets, length = [], 0
        for token_id in self.token_ids:
            offsets.append(min(length, len(self.text)))
            length += len(self._detokenizer.push((token_id,)))
        return offsets


class CompletionChoiceState:
    """`texts` is given when log-probabilities were asked for; `only_echo` drops the one token that was computed."""

    def __init__(
        self, index: int, pipe: TextPipe, texts: TokenTexts | None, echo: Echo | None, *, only_echo: bool = False
    ) -> None:
        self.index = index
        self.pipe = pipe
        self.is_finished = False
        self._texts = texts
        self._echo = echo
        self._only_echo = only_echo
        self._shift = len(echo.text) if echo else 0

    def push(self, output: EngineOutput) -> list[CompletionChoice]:
        """What this output adds; the last choice has the finish reason and then `is_finished` is set."""
        choices: list[CompletionChoice] = []
        if self._echo is not None:
            choices.append(self._echoed(self._echo, output))
            self._echo = None
        text, entries = self.pipe.push(output)
        reason = self.pipe.finish_reason
        if self._only_echo:
            text, entries = "", []
            if reason is not None:
                reason = "length"
                self.pipe.token_ids.clear()
        self.is_finished = reason is not None
        if text or entries or self.is_finished:
            choices.append(
                {"index": self.index, "text": text, "logprobs": self._logprobs(entries), "finish_reason": reason}
            )
        return choices

    def _echoed(self, echo: Echo, output: EngineOutput) -> CompletionChoice:
        logprobs = None
        if self._texts is not None:
            assert output.prompt_logprobs is not None, "the engine was asked for prompt log-probabilities"
            logprobs = self._prompt_logprobs(self._texts, echo, output.prompt_logprobs)
        return {"index": self.index, "text": echo.text, "logprobs": logprobs, "finish_reason": None}

    def _prompt_logprobs(
        self, texts: TokenTexts, echo: Echo, entries: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        return {
            "tokens": [texts.named(token_id)[0] for token_id in echo.token_ids],
            "token_logprobs": [finite(entry.logprob) if entry else 0.0 for entry in entries],
            "top_logprobs": [texts.top_by_text(entry) if entry else {} for entry in entries],
            "text_offset": echo.offsets(),
        }

    def _logprobs(self, entries: Sequence[tuple[int, TokenLogprob]]) -> CompletionLogprobs | None:
        texts = self._texts
        if texts is None:
            return None
        return {
            "tokens": [texts.named(entry.token_id)[0] for _, entry in entries],
            "token_logprobs": [finite(entry.logprob) for _, entry in entries],
            "top_logprobs": [texts.top_by_text(entry) for _, entry in entries],
            "text_offset": [self._shift + offset for offset, _ in entries],
        }
