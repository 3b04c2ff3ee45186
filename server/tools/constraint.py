"""Decoding constraints through llguidance: JSON, JSON schemas, forced and strict tool calls as token masks.

`ConstraintFactory` (one a model) turns a request's wish into a `CompiledGrammar`; `CompiledGrammar.new()` makes the
engine's `Grammar` (server/engine/params.py), one for every sequence. Compiling takes about a millisecond for usual
schemas and up to half a second at the limits of schema.py, so HTTP handlers call the factory in a thread. The
first use builds the token trie (0.12 s and 16 MB for 49,152 tokens).

What is true of llguidance 1.9: `fill_mask` releases the GIL while it computes (6-50 µs usually, about 20 ms at most:
its per-step limits raise GrammarError then), but takes it back for moments to tokenize text that the grammar forces,
with our own tokenizer, so that forced text gets its canonical tokens. `advance` keeps the GIL (microseconds). Its
`LLExecutor` fills several masks on a thread pool of its own, which we do not want. A mask row must be exactly as long
as the vocabulary, so the vocabulary is padded to the core's `mask_words`.

All end-of-generation tokens end a grammar, all are allowed when it may end, and only they when it must.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import llguidance
import llguidance.numpy
import numpy as np

from server.errors import InvalidRequestError
from server.tools import grammars
from server.tools.formats import ToolFormat
from server.tools.schema import NO_DETAILS, bounded_schema, refusal

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

# Compiled grammars kept for the next request with the same schema; the largest take some 5 MB.
_CACHE_SIZE = 32

# Above llguidance's 2,000: an object of 1,000 optional properties (schema.py's limit) takes 4,000.
_MAX_ITEMS_IN_ROW = 8_000

# A control character: in a SentencePiece vocabulary always a byte token, merged with nothing.
_BREAK = "\x02"


class VocabularyTokenizer(Protocol):
    """What is needed of server/text's Tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eog_token_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def is_special(self, token_id: int) -> bool: ...
    def token_to_id(self, text: str) -> int | None: ...


class GrammarError(RuntimeError):
    """A grammar hit one of llguidance's per-step limits in the middle of an answer: end the sequence with an error."""


class TokenGrammar:
    """The engine's `Grammar` for one sequence; not shared between threads at a time."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, mask: np.ndarray) -> None:
        """Overwrites the whole row. Raises GrammarError: an end forced by the failure would pass for a whole answer."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask[np.newaxis, :])
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().replace(NO_DETAILS, "").strip())

    def advance(self, token_id: int) -> bool:
        """False for a token outside the mask; the grammar is then of no further use."""
        return not self._matcher.is_error() and bool(self._matcher.consume_token(token_id))

    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def fork(self) -> "TokenGrammar":
        """0.8 µs: llguidance shares what it has computed."""
        return TokenGrammar(self._matcher.deep_copy())

    def take(self, token_ids: Sequence[int]) -> int:
        return int(self._matcher.try_consume_tokens(list(token_ids)))

    def forced_tokens(self) -> list[int]:
        """llguidance says which text must follow and how it is tokenized (0.2 µs when none must); that the mask
        leaves nothing else is checked token by token, at some 5 µs each, because the answer hangs on it."""
        matcher = self._matcher.deep_copy()
        forced: list[int] = []
        for token_id in matcher.compute_ff_tokens():
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint32)
            if not _is_only(bits, token_id) or not matcher.consume_token(token_id):
                break
            forced.append(token_id)
        return forced


def _is_only(bits: np.ndarray, token_id: int) -> bool:
    return np.count_nonzero(bits) == 1 and int(bits[token_id // 32]) == 1 << token_id % 32


class CompiledGrammar:
    """Compiled once; `new` gives every sequence (every choice of `n`) its own state."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._lock = threading.Lock()

    def new(self) -> TokenGrammar:
        with self._lock:  # the Rust object allows one borrower at a time
            return TokenGrammar(self._matcher.deep_copy())


class ConstraintFactory:
    """Makes grammars for one model. Thread-safe. All methods raise InvalidRequestError for what cannot be enforced."""

    def __init__(self, tokenizer: VocabularyTokenizer, *, mask_words: int) -> None:
        assert mask_words * 32 >= tokenizer.vocab_size
        self._tokenizer = tokenizer
        self._mask_words = mask_words
        self._lock = threading.Lock()
        self._ll_tokenizer: llguidance.LLTokenizer | None = None
        self._limits = llguidance.LLParserLimits(max_items_in_row=_MAX_ITEMS_IN_ROW, verbose_errors=False)
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def json_object(self, *, after_reasoning: bool = False) -> CompiledGrammar:
        """`response_format: {"type": "json_object"}`."""
        return self.json_schema(_ANY_OBJECT, param="response_format", after_reasoning=after_reasoning)

    def json_schema(self, schema: object, *, param: str, after_reasoning: bool = False) -> CompiledGrammar:
        """An answer that validates against `schema`; `after_reasoning`: the prompt has opened `<think>`."""
        checked = self._checked(schema, param)
        return self._compile(grammars.json_grammar(checked), param, after_reasoning)

    def forced_tools(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_format: ToolFormat,
        *,
        name: str | None = None,
        parallel: bool = True,
        after_reasoning: bool = False,
    ) -> CompiledGrammar:
        """`tool_choice` "required" (any offered tool; several calls if `parallel`), or exactly one call of `name`."""
        shapes = [shape for shape in self._shapes(tools, strict_only=False) if name in (None, shape.name)]
        assert shapes, "a name that was not offered is refused above"
        grammar = grammars.forced_calls_grammar(
            shapes, tool_format, self._special_token_id, parallel=parallel and name is None
        )
        return self._compile(grammar, "tools", after_reasoning)

    def free_tools(
        self,
        tools: Sequence[Mapping[str, Any]],
        tool_format: ToolFormat,
        *,
        content_schema: object = None,
        after_reasoning: bool = False,
    ) -> CompiledGrammar | None:
        """`tool_choice` "auto": free text, but calls are well formed, and those of `strict` tools follow their schemas.

        With `content_schema` (a `response_format` beside tools) the answer is either calls or JSON of that schema. None
        when nothing asks for a constraint: no tool is strict and there is no `content_schema`.
        """
        if content_schema is None and not any(tool["function"].get("strict") for tool in tools):
            return None
        content = None if content_schema is None else self._checked(content_schema, "response_format")
        grammar = grammars.free_calls_grammar(
            self._shapes(tools, strict_only=True), tool_format, self._special_token_id, content=content
        )
        return self._compile(grammar, "tools", after_reasoning)

    def _shapes(self, tools: Sequence[Mapping[str, Any]], *, strict_only: bool) -> list[grammars.CallShape]:
        """Every tool with the schema its arguments must follow: its own, or with `strict_only` perhaps any object."""
        shapes = []
        for i, tool in enumerate(tools):
            function = tool["function"]
            param = f"tools[{i}].function.parameters"
            own = None if strict_only and not function.get("strict") else (function.get("parameters") or _NO_PARAMETERS)
            schema = _ANY_OBJECT if own is None else _object_schema(own, param)
            shapes.append(grammars.CallShape(function["name"], self._checked(schema, param)))
        return shapes

    def _checked(self, schema: object, param: str) -> dict[str, Any]:
        """The schema with our options, after a compilation of its own, so that a refusal names the right `param`."""
        bounded = bounded_schema(schema, param=param)
        error = llguidance.LLMatcher.validate_grammar(grammars.json_grammar(bounded), limits=self._limits)
        if error:
            raise refusal(error, param=param)
        return bounded

    def _compile(self, grammar: str, param: str, after_reasoning: bool) -> CompiledGrammar:
        if after_reasoning:
            grammar = grammars.after_reasoning(grammar, self._special_token_id)
        with self._lock:
            compiled = self._cache.get(grammar)
            if compiled is not None:
                self._cache.move_to_end(grammar)
                return compiled
        matcher = llguidance.LLMatcher(self._vocabulary(), grammar, log_level=0, limits=self._limits)
        # The first mask finds what compiling does not: schemas that nothing satisfies, and steps over the limits.
        first = np.zeros((1, self._mask_words), dtype=np.int32)
        llguidance.numpy.fill_next_token_bitmask(matcher, first)
        if matcher.is_error():
            raise refusal(matcher.get_error(), param=param)
        compiled = CompiledGrammar(matcher)
        with self._lock:
            self._cache[grammar] = compiled
            while len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return compiled

    def _vocabulary(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = _build_vocabulary(self._tokenizer, self._mask_words)
            return self._ll_tokenizer

    def _special_token_id(self, text: str) -> int | None:
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id is not None and self._tokenizer.is_special(token_id) else None


def _object_schema(schema: object, param: str) -> dict[str, Any]:
    """A tool's parameters as a schema that only objects satisfy."""
    if not isinstance(schema, Mapping):
        raise InvalidRequestError(f"{param}: the schema must be a JSON object", param=param)
    allowed = schema.get("type", "object")
    if allowed != "object" and not (isinstance(allowed, list) and "object" in allowed):
        raise InvalidRequestError(f"{param}: the schema's type is {allowed!r}; it must be 'object'", param=param)
    return {**schema, "type": "object"}


class _Vocabulary:
    """The tokenizer in the shape that LLTokenizer reads: bytes of every token, which are special, and how to encode.

    Padding tokens have no bytes and so are never allowed. End-of-generation tokens count as special even where the
    model file does not say so: text must not be able to spell one.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: VocabularyTokenizer, mask_words: int) -> None:
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = min(tokenizer.eog_token_ids)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.tokens += [b""] * (mask_words * 32 - tokenizer.vocab_size)
        special = {i for i, data in enumerate(self.tokens) if data and tokenizer.is_special(i)}
        self.special_token_ids = sorted(special | tokenizer.eog_token_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Token ids whose bytes are exactly `text`, in the middle of an answer."""
        token_ids = self._tokenizer.encode(text, add_special=False, parse_special=False)
        data = text.encode()
        if b"".join(map(self._tokenizer.token_bytes, token_ids)) == data:
            return token_ids
        # SentencePiece puts a space before a text's beginning: make that the beginning of something else.
        token_ids = self._tokenizer.encode(_BREAK + text, add_special=False, parse_special=False)
        rest = token_ids[[self._tokenizer.token_bytes(i) for i in token_ids].index(_BREAK.encode()) + 1 :]
        assert b"".join(map(self._tokenizer.token_bytes, rest)) == data
        return rest


def _build_vocabulary(tokenizer: VocabularyTokenizer, mask_words: int) -> llguidance.LLTokenizer:
    if not tokenizer.eog_token_ids:
        raise InvalidRequestError("this model has no end-of-generation token, so its answers cannot be constrained")
    vocabulary = _Vocabulary(tokenizer, mask_words)
    # Duck-typed by is_tokenizer_wrapper; the library's TokenizerWrapper would only copy our attributes.
    return llguidance.LLTokenizer(cast(Any, vocabulary), eos_token=sorted(tokenizer.eog_token_ids))
