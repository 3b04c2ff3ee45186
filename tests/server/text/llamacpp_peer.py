"""Tokenizes texts with llama.cpp. Run by the peer's own interpreter (llama-cpp-python lives in its own environment):

    python llamacpp_peer.py < request.json > answer.json

Request: {"model": path, "texts": [...], "parse_special": bool, "add_special": bool}. Answer: {"ids": [[...], ...],
"eog": [...], "pieces": [hex, ...]}. Loads the vocabulary only.
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


def _piece(vocab: object, token_id: int) -> bytes:
    buffer = ctypes.create_string_buffer(1024)
    count = llama_cpp.llama_token_to_piece(vocab, token_id, buffer, len(buffer), 0, True)
    if count < 0:
        raise RuntimeError(f"token {token_id} has {-count} bytes")
    return buffer.raw[:count]


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
    num_tokens = llama_cpp.llama_vocab_n_tokens(vocab)
    answer = {
        "ids": [_tokenize(vocab, t, request["add_special"], request["parse_special"]) for t in request["texts"]],
        "eog": [i for i in range(num_tokens) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "pieces": [_piece(vocab, i).hex() for i in range(num_tokens)],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
