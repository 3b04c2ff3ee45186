"""How llama.cpp sees texts: the most likely token and the log-probability of the next one at every position.

Run by the interpreter that has llama-cpp-python (0.3.36 was measured); one line of JSON each way:

    python llamacpp_logits.py < request.json > answer.json

Request: {"model": path, "threads": n, "texts": [[token ids], ...]}; every text is a sequence of its own that starts at
position 0, in batches of 512 over llama.cpp's default f16 KV cache. Answer: {"texts": [{"top1": [...],
"logprobs": [...]}, ...]}.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

_BATCH = 512


def score(model: object, ids: list[int], threads: int) -> dict[str, list]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = len(ids) + 8, _BATCH, _BATCH
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
    top1, logprobs = [], []
    for begin in range(0, len(ids), _BATCH):
        part = ids[begin : begin + _BATCH]
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, begin + i, 1, True
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(part)
        if llama_cpp.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for i in range(len(part)):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(vocab_size,))
            highest = int(logits.argmax())
            top1.append(highest)
            if begin + i + 1 < len(ids):
                total = np.exp(logits - logits[highest]).sum(dtype=np.float64)
                logprobs.append(float(logits[ids[begin + i + 1]] - logits[highest]) - float(np.log(total)))
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return {"top1": top1, "logprobs": logprobs}


def main() -> None:
    request = json.load(sys.stdin)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {request['model']}")
    print(json.dumps({"texts": [score(model, ids, request["threads"]) for ids in request["texts"]]}))


if __name__ == "__main__":
    main()
