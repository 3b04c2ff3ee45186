"""The engine: one thread that turns submitted token ids into streams of tokens.

Each turn of the thread: take what was submitted and cancelled, schedule, run the core (GIL released), postprocess, post
everything to the event loop with one call. Idle, it sleeps on a condition. Callers on other threads only append
commands to an inbox under a short lock; all state below belongs to the engine thread.

Knows token ids only. Not covered: text, stop strings, tool calls, HTTP; they live above.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from functools import partial

from server.engine.adapters import AdapterSlots, LoadedAdapter, pack
from server.engine.block_manager import BlockManager
from server.engine.core_api import Core
from server.engine.drafting import Drafter
from server.engine.limits import EngineLimits
from server.engine.lora_types import LoraWeights
from server.engine.params import EngineOutput, Grammar, SamplingParams
from server.engine.runner import Runner
from server.engine.scheduler import MAX_MIXED_PREFILL_TOKENS, Outputs, Scheduler
from server.engine.sequence import Sequence
from server.engine.stats import Counters, EngineStats, FinishRate
from server.engine.stream import TokenStream
from server.engine.validation import check_params, to_token_array
from server.errors import AdapterError, QueueFullError, ServerUnavailableError

log = logging.getLogger(__name__)

MAX_STEP_FAILURES = 3
"""Failed steps in a row before `health` reports it: one may be a single request's doing, three are the engine's."""


class Engine:
    """`max_waiting`: requests beyond `max_num_seqs` that may queue. Limits default to the core's own.

    `max_draft_tokens`: guesses a sequence and step; 0 computes no token before the one before it is sampled.

    Raises ConfigError when the limits do not fit the core.
    """

    def __init__(
        self,
        core: Core,
        *,
        max_model_len: int,
        max_waiting: int,
        eog_token_ids: frozenset[int],
        num_blocks: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_mixed_prefill_tokens: int = MAX_MIXED_PREFILL_TOKENS,
        enable_prefix_caching: bool = True,
        max_draft_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = EngineLimits.resolve(
            core,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_mixed_prefill_tokens=max_mixed_prefill_tokens,
            max_model_len=max_model_len,
        )
        self._core = core
        self._clock = clock
        self._eog_token_ids = eog_token_ids
        self._max_waiting = max_waiting
        self._limits = limits
        self._counters = Counters()
        self._blocks = BlockManager(limits.num_blocks, core.block_size, enable_prefix_caching=enable_prefix_caching)
        self._drafter = Drafter(max_draft_tokens, self._counters) if max_draft_tokens else None
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_logit_rows=core.max_logit_rows,
            max_mixed_prefill_tokens=limits.max_mixed_prefill_tokens,
            counters=self._counters,
            drafter=self._drafter,
        )
        self._runner = Runner(
            core,
            max_num_seqs=limits.max_num_seqs,
            max_tokens=limits.max_num_batched_tokens,
            max_blocks=-(-limits.max_model_len // core.block_size),
        )
        self._adapters = AdapterSlots(core)
        self._streams: dict[Sequence, TokenStream] = {}
        self._finish_rate = FinishRate()
        self._failures_in_a_row = 0
        # Shared with callers, under the lock.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._inbox: deque[Callable[[Outputs], None]] = deque()
        self._num_submitted = 0  # of them submissions
        self._next_seq_id = 0
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def max_model_len(self) -> int:
        """Prompt and output together; less than was asked for when the KV pool is smaller."""
        return self._limits.max_model_len

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Outputs are delivered on `loop`."""
        assert self._thread is None, "an engine starts once"
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="sterna-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End whatever still runs with finish_reason "error", then the thread. Idempotent."""
        with self._lock:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def health(self) -> str | None:
        """Why the engine cannot serve, or None when it can."""
        if self._thread is None:
            return "the engine is starting"
        if self._is_stopping:
            return "the engine has stopped"
        if not self._thread.is_alive():
            return "the engine thread died; see the log"
        if self._failures_in_a_row >= MAX_STEP_FAILURES:
            return f"the last {self._failures_in_a_row} engine steps failed; see the log"
        return None

    def submit(
        self,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        adapter: LoadedAdapter | None = None,
        grammar: Grammar | None = None,
        cache_salt: bytes = b"",
        goes_first: bool = False,
    ) -> TokenStream:
        """Queue one sequence. Call from the event loop's thread.

        `goes_first`: before all that waits, and even when the queue is full; for the server's own checks of a token.
        Raises InvalidRequestError, QueueFullError, ServerUnavailableError, AdapterError (`adapter` was unloaded).
        """
        prompt = to_token_array(token_ids, self._core.vocab_size)
        self._limits.check_prompt(len(prompt))
        check_params(params, self._core.vocab_size)
        # Nothing but an end may follow a finished grammar, so there `ignore_eos` would only repeat the end.
        ends = frozenset() if params.ignore_eos and grammar is None else self._eog_token_ids
        with self._lock:
            self._check_accepting(is_queue_bounded=not goes_first)
            if adapter is not None and not self._adapters.acquire(adapter):
                raise AdapterError(f"adapter {adapter.digest} is not loaded any more")
            # The scheduler's order is that of the ids.
            seq = Sequence(
                self._next_seq_id if not goes_first else -1 - self._next_seq_id,
                prompt,
                params,
                seed=params.seed if params.seed is not None else secrets.randbits(64),
                end_token_ids=ends | params.stop_token_ids,
                max_length=min(len(prompt) + params.max_tokens, self.max_model_len),
                adapter=adapter,
                grammar=grammar,
                cache_salt=cache_salt,
            )
            self._next_seq_id += 1
            self._num_submitted += 1
            stream = TokenStream(partial(self._post_command, partial(self._cancel, seq)))
            self._send(partial(self._accept, seq, stream))
        return stream

    def _check_accepting(self, *, is_queue_bounded: bool) -> None:
        self._check_running()
        num_waiting = self._num_submitted + len(self._scheduler.waiting)
        num_held = num_waiting + len(self._scheduler.running)
        if is_queue_bounded and num_held >= self._limits.max_num_seqs + self._max_waiting:
            seconds = self._finish_rate.seconds_for(num_waiting, self._clock())
            raise QueueFullError(
                f"{num_waiting} requests are waiting already; try again in {seconds} s", retry_after_seconds=seconds
            )

    def load_adapter(self, weights: LoraWeights) -> LoadedAdapter:
        """Pack an adapter on the calling thread, and put it into a free slot, while requests run on.

        Not for the event loop's thread. Raises AdapterError when the core refuses the weights or every slot is taken,
        ServerUnavailableError when the engine is not running.
        """
        lora = pack(self._core, weights)
        with self._lock:
            self._check_running()
            return self._adapters.load(lora, weights.digest)

    def unload_adapter(self, adapter: LoadedAdapter) -> "Future[None]":
        """Refuse new sequences on `adapter`; the future is done once its last one has ended and the slot is free."""
        future: Future[None] = Future()
        with self._lock:
            self._check_running()
            self._adapters.begin_unload(adapter, future)
        return future

    def _check_running(self) -> None:
        if self._thread is None or self._is_stopping:
            raise ServerUnavailableError(self.health() or "the engine is not running")

    def stats(self) -> EngineStats:
        return self._counters.snapshot(
            num_running=len(self._scheduler.running),
            num_waiting=self._num_submitted + len(self._scheduler.waiting),
            num_blocks_used=self._blocks.num_used,
            num_blocks_cached=self._blocks.num_cached,
            num_blocks_total=self._blocks.num_blocks,
            num_adapters=self._adapters.num_loaded,
        )

    def _run(self) -> None:
        """The top loop: the one place that survives anything, by ending the sequences that were part of it."""
        while True:
            outputs: Outputs = []
            try:
                if not self._turn(outputs):
                    break
                self._failures_in_a_row = 0
            except Exception:
                self._failures_in_a_row += 1
                self._counters.num_step_errors += 1
                running = self._scheduler.running[:] or self._scheduler.waiting[:1]
                log.exception(
                    "engine step failed, %d in a row; ending %d sequences", self._failures_in_a_row, len(running)
                )
                for seq in running:
                    self._scheduler.end(seq, "error", outputs, "internal error in the engine")
            self._deliver(outputs)
        self._shut_down()

    def _turn(self, outputs: Outputs) -> bool:
        """Commands, then one step if there is work. False when the engine is to stop."""
        with self._lock:
            while not (self._inbox or self._is_stopping or self._scheduler.has_work):
                self._wake.wait()
            if self._is_stopping:
                return False
            while self._inbox:
                self._inbox.popleft()(outputs)
        if self._scheduler.has_work:
            self._step(outputs)
        return True

    def _step(self, outputs: Outputs) -> None:
        start = self._clock()
        plan = self._scheduler.schedule()
        result = self._runner.run(plan)
        num_seqs = len(plan.sequences)
        self._scheduler.postprocess(plan, result, outputs)
        seconds = self._clock() - start
        self._counters.count_step(num_seqs, seconds)
        if self._drafter is not None and not plan.has_prompts:
            self._drafter.cost.observe(plan.num_decode_rows, seconds)

    def _accept(self, seq: Sequence, stream: TokenStream, outputs: Outputs) -> None:
        self._num_submitted -= 1
        self._streams[seq] = stream
        self._scheduler.add(seq)

    def _cancel(self, seq: Sequence, outputs: Outputs) -> None:
        self._scheduler.end(seq, "cancelled", outputs)

    def _deliver(self, outputs: Outputs) -> None:
        """Post a turn's outputs with one wake-up of the event loop."""
        if not outputs:
            return
        items: list[tuple[TokenStream, EngineOutput]] = []
        for seq, output in outputs:
            if output.finish_reason is None:
                items.append((self._streams[seq], output))
                continue
            items.append((self._streams.pop(seq), output))
            self._finish_rate.add(self._clock())
            if seq.adapter is not None:
                with self._lock:
                    self._adapters.release(seq.adapter)
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_dispatch, items)
        except RuntimeError:  # the loop was closed under us: nobody is left to answer
            log.error("the event loop is closed; the engine stops")
            self._is_stopping = True

    def _shut_down(self) -> None:
        outputs: Outputs = []
        with self._lock:
            while self._inbox:
                self._inbox.popleft()(outputs)
            self._adapters.abandon()
        for seq in [*self._scheduler.running, *self._scheduler.waiting]:
            self._scheduler.end(seq, "error", outputs, "the server shut down before the answer was complete")
        self._deliver(outputs)
        self._runner.close()

    def _post_command(self, command: Callable[[Outputs], None]) -> None:
        with self._lock:
            if self._thread is not None and not self._is_stopping:  # else everything ends anyway
                self._send(command)

    def _send(self, command: Callable[[Outputs], None]) -> None:
        """Under the lock."""
        self._inbox.append(command)
        self._wake.notify()


def _dispatch(items: list[tuple[TokenStream, EngineOutput]]) -> None:
    for stream, output in items:
        stream.push(output)
