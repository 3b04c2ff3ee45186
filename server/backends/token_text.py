"""How a single token is shown in log-probabilities: its text, and its bytes.

A token that is no whole UTF-8 text (a piece of an emoji) is shown as OpenAI shows it, `bytes:\\xf0\\x9f`, because a
replacement character would give different tokens one name.
"""

from server.engine.params import TokenLogprob
from server.openai.protocol.chunks import TokenLogprob as WireLogprob
from server.openai.protocol.chunks import TopLogprob
from server.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""OpenAI's value for "very unlikely"; JSON has no -inf, which a masked-out token gets."""


class TokenTexts:
    """Names tokens, remembering each: at most the vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def named(self, token_id: int) -> tuple[str, list[int]]:
        """(text, bytes) of a token."""
        known = self._known.get(token_id)
        if known is None:
            raw = self._tokenizer.token_bytes(token_id)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            known = self._known[token_id] = text, list(raw)
        return known

    def wire(self, entry: TokenLogprob) -> WireLogprob:
        """A chat log-probability entry with its alternatives."""
        text, raw = self.named(entry.token_id)
        top: list[TopLogprob] = []
        for token_id, logprob in entry.top:
            top_text, top_raw = self.named(token_id)
            top.append({"token": top_text, "logprob": finite(logprob), "bytes": top_raw})
        return {"token": text, "logprob": finite(entry.logprob), "bytes": raw, "top_logprobs": top}

    def top_by_text(self, entry: TokenLogprob) -> dict[str, float]:
        """A completion's `top_logprobs` entry: the chosen token is always in it."""
        top = {self.named(token_id)[0]: finite(logprob) for token_id, logprob in reversed(entry.top)}
        top.setdefault(self.named(entry.token_id)[0], finite(entry.logprob))
        return top


def finite(logprob: float) -> float:
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB
