"""llama.cpp's speed on one GGUF, the twin of benchmarks/engine_speed.py: the same cases, as one line of JSON.

Distinct random prompts, 256 tokens of context a sequence, f16 KV, every step a full forward pass with the logits of
every row fetched and their largest taken.

usage: llamacpp_speed.py MODEL.gguf THREADS CASES_AS_JSON    (run by benchmarks/compare.py; needs llama-cpp-python)
"""

import ctypes
import json
import statistics
import sys
import time

import llama_cpp
import numpy as np

PROMPT, CONTEXT, CHUNK, BATCHES = 6, 256, 512, (1, 8, 32)


class Timer:
    def __init__(self, path: str, threads: int, own_clock: bool) -> None:
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._clock = time.process_time if own_clock else time.perf_counter
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._rng = np.random.default_rng(0)
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def _context(self, sequences: int, tokens: int) -> ctypes.c_void_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = tokens, CHUNK, CHUNK, sequences
        params.n_threads = params.n_threads_batch = self._threads
        return llama_cpp.llama_init_from_model(self._model, params)

    def _decode(self, context, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, wants logits)."""
        batch = self._batch
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def _argmax(self, context, row: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax())

    def _fill(self, context, tokens: int) -> float:
        """One prompt, in pieces; tokens per second."""
        rows = [(int(t), i, 0, i == tokens - 1) for i, t in enumerate(self._rng.integers(0, self._vocab_size, tokens))]
        start = self._clock()
        for at in range(0, tokens, CHUNK):
            self._decode(context, rows[at : at + CHUNK])
        self._argmax(context, (tokens - 1) % CHUNK)
        return tokens / (self._clock() - start)

    def prefill(self, tokens: int) -> float:
        context = self._context(1, tokens)
        rate = self._fill(context, tokens)
        llama_cpp.llama_free(context)
        return rate

    def long(self, tokens: int, steps: int) -> tuple[float, float]:
        """Tokens per second of a long prompt, and of decoding after it."""
        context = self._context(1, tokens + steps)
        rate = self._fill(context, tokens)
        token = 1
        start = self._clock()
        for step in range(steps):
            self._decode(context, [(token, tokens + step, 0, True)])
            token = self._argmax(context, 0)
        seconds = self._clock() - start
        llama_cpp.llama_free(context)
        return rate, steps / seconds

    def decode(self, sequences: int, steps: int) -> float:
        context = self._context(sequences, CONTEXT * sequences)
        prompts = self._rng.integers(0, self._vocab_size, (sequences, PROMPT))
        last = PROMPT - 1
        self._decode(context, [(int(prompts[s, i]), i, s, i == last) for s in range(sequences) for i in range(PROMPT)])
        tokens = [self._argmax(context, s * PROMPT + last) for s in range(sequences)]
        start = self._clock()
        for step in range(steps):
            self._decode(context, [(tokens[s], PROMPT + step, s, True) for s in range(sequences)])
            tokens = [self._argmax(context, s) for s in range(sequences)]
        seconds = self._clock() - start
        llama_cpp.llama_free(context)
        return sequences * steps / seconds


def main() -> None:
    path, threads, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    timer = Timer(path, threads, cases["own_clock"])
    repeats = range(cases["repeats"])
    timer.prefill(cases["prefill"])
    result: dict[str, object] = {"engine": f"llama.cpp ({llama_cpp.__version__})"}
    result["prefill"] = round(statistics.median(timer.prefill(cases["prefill"]) for _ in repeats), 2)
    long_prefill, long_decode = timer.long(cases["long_prefill"], cases["long_steps"])
    result |= {"long_prefill": round(long_prefill, 2), "long_decode": round(long_decode, 2)}
    for batch in BATCHES:
        rates = [timer.decode(batch, cases["steps"]) for _ in repeats]
        result[f"decode_b{batch}"] = round(statistics.median(rates), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
