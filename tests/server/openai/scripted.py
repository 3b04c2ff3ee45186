"""A scripted engine and a byte tokenizer: what the backend and the HTTP tests run on, with no model.

The engine answers every submission from a script: a function of (prompt ids, params) that returns the answer's text or
token ids and how they are cut into outputs. Outputs arrive one per turn of the event loop, as from the real engine.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from server.engine.adapters import LoadedAdapter
from server.engine.lora_types import LoraWeights
from server.engine.params import EngineOutput, Grammar, SamplingParams, TokenLogprob
from server.engine.stream import TokenStream
from server.errors import QueueFullError
from server.text.tokenizer import Tokenizer, build_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>")
DIGEST = "sha256:0123456789abcdef" + "0" * 48
FINGERPRINT = "fp_0123456789abcdef"


@dataclass(frozen=True)
class Source:
    """As quant.model_file.TokenizerSource."""

    kind: str
    metadata: dict[str, object]
    tokenizer_json: str | None


def byte_tokenizer(chat_template: str | None = CHATML) -> Tokenizer:
    """One token a byte, and two special tokens; `<|im_end|>` ends a generation."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    metadata = {"eos_token": "<|im_end|>", "chat_template": chat_template}
    source = Source(kind="hf", metadata=metadata, tokenizer_json=library.to_str())
    return build_tokenizer(source, library.get_vocab_size())


@dataclass
class Answer:
    """A scripted answer. `cuts` are lengths in tokens of the outputs (the rest comes in the last one)."""

    text: str | bytes = ""
    cuts: Sequence[int] | None = None
    """None: one token an output."""
    finish_reason: str = "stop"
    logprob: float = -0.5
    num_cached_tokens: int = 0
    error: str | None = None
    hang: bool = False
    """Never finish: for disconnect tests."""


Script = Callable[[Sequence[int], SamplingParams], Answer]


@dataclass
class Submitted:
    token_ids: list[int]
    params: SamplingParams
    grammar: Grammar | None
    is_cancelled: bool = False
    adapter: LoadedAdapter | None = None
    cache_salt: bytes = b""


@dataclass
class ScriptedEngine:
    tokenizer: Tokenizer
    script: Script = lambda token_ids, params: Answer("Hello!")
    submitted: list[Submitted] = field(default_factory=list)
    is_full: bool = False
    unhealthy: str | None = None
    on_cancel: Callable[[], None] = lambda: None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: LoadedAdapter | None = None,
        grammar: Grammar | None = None,
        cache_salt: bytes = b"",
    ) -> TokenStream:
        if self.is_full:
            raise QueueFullError("64 requests are waiting already", retry_after_seconds=7)
        record = Submitted(list(token_ids), params, grammar, adapter=adapter, cache_salt=cache_salt)
        self.submitted.append(record)
        stream = TokenStream(lambda: self._cancel(record))
        task = asyncio.get_running_loop().create_task(self._play(record, stream))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return stream

    def _cancel(self, record: Submitted) -> None:
        record.is_cancelled = True
        self.on_cancel()

    def load_adapter(self, weights: LoraWeights) -> LoadedAdapter:
        return LoadedAdapter(0, weights.digest)

    def unload_adapter(self, adapter: LoadedAdapter) -> "Future[None]":
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def health(self) -> str | None:
        return self.unhealthy

    async def _play(self, record: Submitted, stream: TokenStream) -> None:
        answer = self.script(record.token_ids, record.params)
        outputs = self._outputs(record, answer)
        for output in outputs:
            await asyncio.sleep(0)
            if record.is_cancelled:
                stream.push(EngineOutput(finish_reason="cancelled"))
                return
            stream.push(output)

    def _outputs(self, record: Submitted, answer: Answer) -> list[EngineOutput]:
        params = record.params
        raw = answer.text.encode() if isinstance(answer.text, str) else answer.text
        token_ids = bytes_to_ids(self.tokenizer, raw)
        reason, end = answer.finish_reason, None
        if len(token_ids) >= params.max_tokens:
            token_ids, reason = token_ids[: params.max_tokens], "length"
        elif reason == "stop" and not answer.hang:
            end = self.tokenizer.token_to_id("<|im_end|>")
            token_ids.append(end)
        outputs = []
        start = 0
        for cut in [*(answer.cuts if answer.cuts is not None else [1] * len(token_ids)), len(token_ids)]:
            piece = token_ids[start : start + cut]
            start += cut
            is_last = start >= len(token_ids) and not answer.hang
            outputs.append(
                EngineOutput(
                    token_ids=piece,
                    logprobs=self._logprobs(piece, params.num_logprobs, answer.logprob),
                    prompt_logprobs=None if outputs else self._prompt_logprobs(record),
                    finish_reason=reason if is_last else None,
                    stop_token_id=end if is_last else None,
                    error=answer.error if is_last else None,
                    num_cached_tokens=answer.num_cached_tokens,
                )
            )
            if is_last:
                break
        return outputs

    def _prompt_logprobs(self, record: Submitted) -> list[TokenLogprob | None] | None:
        count = record.params.num_prompt_logprobs
        if count is None:
            return None
        return [None, *self._logprobs(record.token_ids[1:], count, -1.5)]

    def _logprobs(self, token_ids: Sequence[int], count: int | None, logprob: float) -> list[TokenLogprob] | None:
        if count is None:
            return None
        return [TokenLogprob(i, logprob, tuple((j, logprob - j / 8) for j in range(min(count, 5)))) for i in token_ids]


def bytes_to_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """Any bytes, also those that are no UTF-8."""
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if not tokenizer.is_special(i)}
    return [by_byte[bytes([byte])] for byte in raw]
