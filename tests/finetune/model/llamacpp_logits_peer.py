"""Logits of llama.cpp with and without LoRA files. Run by the peer's own interpreter (it has llama-cpp-python):

    python llamacpp_logits_peer.py < request.json

Request: {"model": path, "loras": [path or null, ...], "texts": [[token ids], ...], "output": path}. Writes an .npz file
with one float32 array (positions, vocabulary) called "LORA/TEXT", by index. One thread, default f16 KV cache.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def logits_of(model: object, adapter: object, ids: list[int]) -> np.ndarray:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids) + 8
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    if adapter is not None:
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise SystemExit("llama_set_adapters_lora failed")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    batch.n_tokens = len(ids)
    if llama_cpp.llama_decode(context, batch) != 0:
        raise SystemExit("llama_decode failed")
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(vocab_size,)).copy()
        for i in range(len(ids))
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(rows)


def main() -> None:
    request = json.load(sys.stdin)
    said: list[bytes] = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text) if level >= 4 else None)
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {request['model']}: {said}")
    found = {}
    for i, path in enumerate(request["loras"]):
        adapter = None if path is None else llama_cpp.llama_adapter_lora_init(model, path.encode())
        if path is not None and not adapter:
            raise SystemExit(f"llama.cpp cannot load {path}: {said}")
        for j, ids in enumerate(request["texts"]):
            found[f"{i}/{j}"] = logits_of(model, adapter, ids)
    np.savez(request["output"], **found)


if __name__ == "__main__":
    main()
