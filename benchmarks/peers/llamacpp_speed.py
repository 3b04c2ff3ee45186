"""llama.cpp's speed on one GGUF: prefill of 512 tokens, greedy decode at batch 1, 8 and 32; one line of JSON.

The twin of `sterna bench`: distinct random prompts, 64 decode steps, 256 tokens of context a sequence, f16 KV, every
step a full forward pass with the logits of every row fetched. Median of three.

usage: llamacpp_speed.py MODEL.gguf THREADS     (run by benchmarks/compare.py; needs llama-cpp-python and numpy)
"""

import ctypes
import json
import statistics
import sys
import time

import llama_cpp
import numpy as np

PREFILL, PROMPT, STEPS, CONTEXT, BATCHES, REPEATS = 512, 6, 64, 256, (1, 8, 32), 3


class Timer:
    def __init__(self, path: str, threads: int) -> None:
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._rng = np.random.default_rng(0)

    def _context(self, sequences: int, tokens: int) -> ctypes.c_void_p:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = tokens, PREFILL, PREFILL, sequences
        params.n_threads = params.n_threads_batch = self._threads
        return llama_cpp.llama_init_from_model(self._model, params)

    def _decode(self, context, batch, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, wants logits)."""
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def _argmax(self, context, row: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).argmax())

    def prefill(self) -> float:
        context, batch = self._context(1, PREFILL), llama_cpp.llama_batch_init(PREFILL, 0, 1)
        ids = self._rng.integers(0, self._vocab_size, PREFILL)
        rows = [(int(t), i, 0, i == PREFILL - 1) for i, t in enumerate(ids)]
        start = time.perf_counter()
        self._decode(context, batch, rows)
        self._argmax(context, PREFILL - 1)
        seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return PREFILL / seconds

    def decode(self, sequences: int) -> float:
        context = self._context(sequences, CONTEXT * sequences)
        batch = llama_cpp.llama_batch_init(PREFILL, 0, 1)
        prompts = self._rng.integers(0, self._vocab_size, (sequences, PROMPT))
        last = PROMPT - 1
        self._decode(
            context, batch, [(int(prompts[s, i]), i, s, i == last) for s in range(sequences) for i in range(PROMPT)]
        )
        tokens = [self._argmax(context, s * PROMPT + last) for s in range(sequences)]
        start = time.perf_counter()
        for step in range(STEPS):
            self._decode(context, batch, [(tokens[s], PROMPT + step, s, True) for s in range(sequences)])
            tokens = [self._argmax(context, s) for s in range(sequences)]
        seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return sequences * STEPS / seconds


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    timer = Timer(path, threads)
    timer.prefill()
    result: dict[str, object] = {"engine": f"llama.cpp ({llama_cpp.__version__})", "model": path, "threads": threads}
    result["prefill512_tok_s"] = round(statistics.median(timer.prefill() for _ in range(REPEATS)), 1)
    for batch in BATCHES:
        result[f"decode_b{batch}_tok_s"] = round(statistics.median(timer.decode(batch) for _ in range(REPEATS)), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
