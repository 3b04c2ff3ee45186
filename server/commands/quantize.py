"""`sterna quantize`: a model as a GGUF file of other types, with a table of what became of each tensor.

The file is written beside its name and renamed, a slice of a tensor at a time. `--evaluate` runs the engine on both
models. Which type a tensor gets: quant/export_types.py; the numbers: quant/quantize.py.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from quant.formats import WRITABLE, GGMLType
from server.commands.arguments import Parser, add_settings, parse_with_settings
from server.commands.progress import Bar, show_status
from server.commands.table import print_table
from server.config import DEFAULT_MODEL, Settings, limit_library_threads
from server.errors import ConfigError, UsageError
from server.machine import physical_cores
from server.models.catalog import resolve_model
from server.units import format_bytes

if TYPE_CHECKING:
    from quant.export import TensorReport
    from quant.model_file import ModelFile

TYPES = {type_.name.lower(): type_ for type_ in WRITABLE}
_SETTINGS = ("threads", "isa", "cache_dir")
_BF16_BYTES = 2


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        "quantize",
        "Write a model as a GGUF file of another type.",
        f"sterna quantize {DEFAULT_MODEL} small.gguf --type q4_0 --keep token_embd.weight=q4_0",
    )
    parser.add_argument("source", metavar="SRC", help="a pulled model, a .gguf file or a Hugging Face directory")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write; it must not exist")
    parser.add_argument("--type", metavar="TYPE", help=f"of the matrices: {', '.join(TYPES)}")
    parser.add_argument(
        "--keep",
        metavar="PATTERN=TYPE",
        action="append",
        default=[],
        help="matrices whose names match (*, ?) get this type instead; the first match counts",
    )
    parser.add_argument(
        "--scale",
        choices=("absmax", "absmean"),
        default="absmax",
        help="of ternary types: each block's largest magnitude, as ggml's, or the tensor's mean, as BitNet's [absmax]",
    )
    parser.add_argument("--evaluate", metavar="FILE", type=Path, help="a text: perplexity on it before and after")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_settings(parser, _SETTINGS)
    options, settings = parse_with_settings(parser, arguments)
    signal.signal(signal.SIGTERM, _exit_cleanly)
    limit_library_threads()
    result = _run(options, settings)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0


def _run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from quant.export_types import choose_types
    from quant.model_file import open_model

    if options.type is None:
        raise UsageError(f"--type is missing: one of {', '.join(TYPES)} (sterna quantize --help)")
    wanted, keep = _type("--type", options.type), [_keep(text) for text in options.keep]
    text = None if options.evaluate is None else _read_text(options.evaluate)
    if os.path.lexists(options.out):
        raise ConfigError(f"{options.out} exists already")
    file = open_model(resolve_model(options.source, settings.cache_dir).path)
    try:
        tensors = {name: (tensor.type, tensor.shape) for name, tensor in file.tensors.items()}
        choices = choose_types(file.path, tensors, wanted, keep)
        metadata = _metadata(file, wanted)
        before = None if text is None else _perplexity(file, options.evaluate, text, settings)
        reports = _write(file, options, choices, metadata)
        result = _result(file, options.out, reports)
    finally:
        file.close()
    if text is not None:
        written = open_model(options.out)
        try:
            after = _perplexity(written, options.evaluate, text, settings)
        finally:
            written.close()
        result["perplexity"] = {"text": str(options.evaluate), "before": before, "after": after}
    return result


def _type(flag: str, name: str) -> GGMLType:
    if name.lower() not in TYPES:
        raise UsageError(f"{flag}: no type {name!r} to write; there are {', '.join(TYPES)}")
    return TYPES[name.lower()]


def _keep(text: str) -> tuple[str, GGMLType]:
    pattern, _, name = text.rpartition("=")
    if not pattern:
        raise UsageError(f"--keep: {text!r} is not PATTERN=TYPE, as in token_embd.weight=q8_0")
    return pattern, _type(f"--keep {pattern}", name)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--evaluate: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--evaluate: {path}: the text is not UTF-8") from None


def _metadata(file: "ModelFile", wanted: GGMLType) -> dict[str, Any]:
    from quant.export import gguf_metadata
    from quant.gguf_metadata import config_metadata
    from server.text.gguf_export import gguf_tokenizer_metadata

    if file.tokenizer.kind == "gguf":
        return gguf_metadata(file, wanted)
    return config_metadata(file.config, wanted) | gguf_tokenizer_metadata(file.tokenizer, file.config.vocab_size)


def _write(file: "ModelFile", options: argparse.Namespace, choices: Any, metadata: dict[str, Any]) -> Any:
    from quant.export import export_gguf, written_bytes

    bar = Bar()
    bar.begin(options.out.name, written_bytes(file, choices))
    try:
        return export_gguf(file, options.out, choices, metadata, absmean=options.scale == "absmean", progress=bar.at)
    finally:
        bar.end()


def _perplexity(file: "ModelFile", path: Path, text: str, settings: Settings) -> dict[str, Any]:
    from server.engine.perplexity import WINDOW_TOKENS, perplexity
    from server.engine.weights import load_core
    from server.text.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(file.tokenizer, file.config.vocab_size)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    window = min(WINDOW_TOKENS, file.config.context_length)
    show_status(f"loading {file.path.name}")
    core = load_core(
        file,
        isa=settings.isa,
        num_threads=settings.threads or physical_cores(),
        num_blocks=-(-window // 16),
        max_num_seqs=1,
        max_batch_tokens=64,  # as many as the core gives logits of in a step
        max_model_len=window,
    )
    try:
        measured = perplexity(
            core,
            ids,
            prefix_ids=[tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else [],
            window_tokens=window,
            progress=lambda done, total: show_status(f"{file.path.name}: token {done:,} of {total:,}"),
        )
    except ValueError as error:
        raise ConfigError(f"--evaluate: {path}: {error}") from None
    finally:
        show_status("")
    return {"value": measured.value, "num_scored": measured.num_scored}


def _result(file: "ModelFile", out: Path, reports: "Sequence[TensorReport]") -> dict[str, Any]:
    num_elements, num_bytes = sum(r.num_elements for r in reports), sum(r.num_bytes for r in reports)
    rows = [
        {
            "name": report.name,
            "shape": list(report.shape),
            "source_type": report.source_type.name,
            "type": report.choice.type.name,
            "bytes": report.num_bytes,
            "relative_error": report.relative_error,
            "note": report.choice.note,
        }
        for report in reports
    ]
    return {
        "source": str(file.path),
        "path": str(out),
        "tensors": rows,
        "num_parameters": num_elements,
        "weight_bytes": num_bytes,
        "file_bytes": out.stat().st_size,
        "bits_per_weight": 8 * num_bytes / num_elements,
        "ratio_to_bf16": num_bytes / (_BF16_BYTES * num_elements),
    }


def _show(result: dict[str, Any]) -> None:
    print_table(
        ("tensor", "shape", "from", "type", "size", "error", ""),
        [
            (row["name"], " x ".join(map(str, row["shape"])), row["source_type"], row["type"],
             format_bytes(row["bytes"]), f"{100 * row['relative_error']:.2f} %", row["note"])
            for row in result["tensors"]
        ],
    )  # fmt: skip
    print()
    facts = [
        ("weights", f"{format_bytes(result['weight_bytes'])}, {result['bits_per_weight']:.2f} bits a weight"),
        ("of bf16", f"{100 * result['ratio_to_bf16']:.1f} %"),
        ("file", f"{result['path']}, {format_bytes(result['file_bytes'])}"),
    ]
    if "perplexity" in result:
        before, after = result["perplexity"]["before"], result["perplexity"]["after"]
        change = 100 * (after["value"] / before["value"] - 1)
        text = f"{before['value']:.4f} before, {after['value']:.4f} after ({change:+.2f} %), "
        facts.append(("perplexity", text + f"{before['num_scored']:,} tokens of {result['perplexity']['text']}"))
    print_table(None, facts)


def _exit_cleanly(signum: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack like Ctrl-C, so that what was half written is removed."""
    sys.exit(128 + signum)
