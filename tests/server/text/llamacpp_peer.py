"""Tokenizes texts with llama.cpp. Run by the peer's own interpreter (llama-cpp-python lives in its own environment):

    python llamacpp_peer.py < request.json > answer.json

Request: {"model": path, "texts": [...], "parse_special": bool, "add_special": bool}. Answer: {"ids": [[...], ...],
"eog": [...]}. Loads the vocabulary only.
"""

import ctypes
import json
import sys

import llama_cpp


def _tokenize(vocab: object, text: str, add_special: bool, parse_special: bool) -> list[int]:
    data = text.encode()
    room = len(data) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, add_special, parse_special)
    if count < 0:
        raise RuntimeError(f"llama_tokenize needs {-count} tokens for {text!r}")
    return list(ids[:count])


def main() -> None:
    request = json.load(sys.stdin)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_load_model_from_file(request["model"].encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {request['model']}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    answer = {
        "ids": [_tokenize(vocab, t, request["add_special"], request["parse_special"]) for t in request["texts"]],
        "eog": [i for i in range(llama_cpp.llama_vocab_n_tokens(vocab)) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "pieces": [],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
