"""`sterna bench`: the engine alone, without HTTP: prefill of 512 tokens, decode at batch 1, 8 and 32.

The measuring is in server/engine/bench.py; this wires it to the terminal. `--json` prints one line with the keys of
llama.cpp's counterpart, so that two runs can be set side by side.
"""

import json
from collections.abc import Sequence

from server.commands.arguments import Parser, add_settings, parse_with_settings
from server.commands.progress import show_status
from server.config import DEFAULT_MODEL, limit_library_threads
from server.machine import physical_cores
from server.models.catalog import resolve_model

ROWS = {
    "prefill512_tok_s": "prefill, 512 tokens",
    "decode_b1_tok_s": "decode, batch 1",
    "decode_b8_tok_s": "decode, batch 8",
    "decode_b32_tok_s": "decode, batch 32",
}


def main(arguments: Sequence[str]) -> int:
    parser = Parser("bench", "Measure the engine alone.", f"sterna bench --model {DEFAULT_MODEL} --threads 2 --json")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    add_settings(parser, ["model", "threads", "isa", "cache_dir"])
    options, settings = parse_with_settings(parser, arguments)
    model = resolve_model(settings.model, settings.cache_dir)
    limit_library_threads()
    from server.engine.bench import run_bench

    result = run_bench(model.path, threads=settings.threads or physical_cores(), isa=settings.isa, progress=show_status)
    show_status("")
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{model.name}, {result['threads']} threads\n")
    width = max(len(text) for text in ROWS.values())
    for key, text in ROWS.items():
        print(f"{text:<{width}}  {result[key]:>9.1f} tokens/s")
    return 0
