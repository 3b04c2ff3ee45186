"""`sterna generate`: one prompt answered on the terminal, streamed, by the same backend that serves.

The prompt is an argument or standard input. Only the answer goes to standard output.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from server.commands.arguments import Parser, add_settings, parse_with_settings
from server.config import DEFAULT_MODEL, Settings, limit_library_threads
from server.errors import UsageError

# What makes sense for one prompt; the rest is the server's.
SETTINGS = (
    "model", "quantize", "chat_template", "threads", "isa", "kv_memory", "max_model_len", "cache_dir"
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        "generate",
        "Answer one prompt on the terminal.",
        f'sterna generate --model {DEFAULT_MODEL} --temperature 0 "Name three primary colors."',
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; standard input if it is not given")
    style = parser.add_mutually_exclusive_group()
    style.add_argument(
        "--chat", dest="raw", action="store_false", help="as a user's message in the chat template [yes]"
    )
    style.add_argument("--raw", dest="raw", action="store_true", help="continue the prompt as it is")
    parser.set_defaults(raw=False)
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 always takes the likeliest token [1.0]")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")
    add_settings(parser, SETTINGS)
    options, settings = parse_with_settings(parser, arguments)
    prompt = options.prompt if options.prompt is not None else _read_prompt()
    limit_library_threads()
    asyncio.run(_generate(settings.model_copy(update={"max_num_seqs": 1}), options, prompt))
    return 0


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise UsageError("a prompt is missing: as an argument or on standard input (sterna generate --help)")
    return sys.stdin.read()


async def _generate(settings: Settings, options: argparse.Namespace, prompt: str) -> None:
    from server.backends.base import Call
    from server.metrics import Metrics
    from server.runtime import load_model

    request = _request(options, prompt)
    loaded = load_model(settings)
    loaded.engine.start(asyncio.get_running_loop())
    try:
        kind: Literal["completions", "chat"] = "completions" if options.raw else "chat"
        call = Call(Metrics().start_request(kind, loaded.model.name))
        answer = loaded.backend.complete if options.raw else loaded.backend.chat
        async for text in _texts(answer(request, call)):
            print(text, end="", flush=True)
    finally:
        await asyncio.to_thread(loaded.close)
    print()


def _request(options: argparse.Namespace, prompt: str) -> Any:
    """The wire request, so that values are checked as the server checks them."""
    from pydantic import ValidationError

    from server.openai.protocol.chat import ChatRequest
    from server.openai.protocol.completions import CompletionRequest

    fields = {
        "model": "",
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "stream": True,
    }
    try:
        if options.raw:
            return CompletionRequest.model_validate({**fields, "prompt": prompt})
        return ChatRequest.model_validate({**fields, "messages": [{"role": "user", "content": prompt}]})
    except ValidationError as error:
        lines = [f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors()]
        raise UsageError("\n".join(lines)) from None


async def _texts(chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
    """What of each chunk a person reads: a chat's reasoning and content, or a completion's text."""
    async for chunk in chunks:
        for choice in chunk["choices"]:
            part = choice.get("delta", choice)
            yield part.get("reasoning_content") or part.get("content") or part.get("text") or ""
