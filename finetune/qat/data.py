"""Dialogues as JSON lines to examples with loss on the assistant's tokens, held out ones beside, kept on disk.

A data set is a folder of `sterna dataset generate`, or one file in OpenAI's fine-tuning form ("messages", "tools"), a
share of which is then held out by digest. Rendering by the server's own code takes milliseconds a turn, so the token
ids are kept in the run's folder under a digest of all they depend on. Not here: micro-batches (finetune/rounds/steps).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from finetune.dataset.dialogues.examples import Dialogue, check_value, read_object
from finetune.dataset.dialogues.vocabulary import tokenize
from finetune.dataset.errors import DialogueError, UnrenderableError
from finetune.dataset.jsonl import file_digest
from finetune.dataset.render import Renderer
from finetune.gate.expected import parse_arguments
from finetune.packed import Example
from server.openai.protocol.chat import ChatRequest

TRAIN, HELD_OUT = "train.jsonl", "validation.jsonl"
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Lessons:
    examples: list[Example]
    difficulty: list[float]
    held_out: list[Example]
    held_out_difficulty: list[float]
    digest: str
    """Of the files and of what tokenized them."""
    num_too_long: int


@dataclass(frozen=True)
class Source:
    """Where dialogues are. Raises DialogueError for a path that is none."""

    path: Path

    def __post_init__(self) -> None:
        for file in self.files:
            if not file.is_file():
                raise DialogueError(
                    f"{file} is no file; expected a .jsonl file, or a folder of `sterna dataset generate`"
                )

    @property
    def files(self) -> list[Path]:
        return [self.path / TRAIN, self.path / HELD_OUT] if self.path.is_dir() else [self.path]

    def digest(self) -> str:
        return "-".join(file_digest(file) for file in self.files)

    def train(self) -> Iterator[tuple[str, Dialogue]]:
        """(where it stands, dialogue). Raises DialogueError naming the line."""
        for where, one in _read(self.files[0]):
            if self.path.is_dir() or not _is_held_out(one):
                yield where, one

    def held_out(self) -> Iterator[tuple[str, Dialogue]]:
        for where, one in _read(self.files[-1]):
            if self.path.is_dir() or _is_held_out(one):
                yield where, one


def read_lessons(
    source: Source, renderer: Renderer, folder: Path, max_tokens: int, *, on_dialogue: Callable[[], None] = lambda: None
) -> Lessons:
    """Raises DialogueError naming the line that cannot be read or rendered, or a set without a training example."""
    digest = lessons_digest(source, renderer, max_tokens)
    kept = folder / f"tokens-{digest[7:23]}.npz"
    if not kept.exists():
        _tokenize(source, renderer, kept, max_tokens, on_dialogue)
    with np.load(kept) as found:
        examples, difficulty = _unpacked(found, "train")
        held_out, held_out_difficulty = _unpacked(found, "held_out")
        num_too_long = int(found["num_too_long"])
    if not examples:
        raise DialogueError(f"{source.path}: no example of at most {max_tokens} tokens to train on")
    return Lessons(examples, difficulty, held_out, held_out_difficulty, digest, num_too_long)


def with_answer_weight(lessons: Lessons, weight: float) -> Lessons:
    """Less of what answers say in training; that they are answers and where they end (their first and last token) keeps
    its weight."""
    if weight == 1:
        return lessons

    def lighter(one: Example) -> Example:
        if one.is_call:
            return one
        weights, at = one.weights.copy(), np.flatnonzero(one.weights)
        weights[at[1:-1]] *= np.float32(weight)
        return replace(one, weights=weights)

    return replace(lessons, examples=[lighter(one) for one in lessons.examples])


def lessons_digest(source: Source, renderer: Renderer, max_tokens: int) -> str:
    """Of all that token ids depend on."""
    identity = renderer.identity
    parts = (source.digest(), identity.tokenizer_digest, identity.template_digest, str(max_tokens))
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tokenize(source: Source, renderer: Renderer, kept: Path, max_tokens: int, on_dialogue: Callable[[], None]) -> None:
    arrays: dict[str, np.ndarray] = {}
    num_too_long = 0
    for part, lines in (("train", source.train()), ("held_out", source.held_out())):
        examples, difficulty = [], []
        for where, dialogue in lines:
            try:
                found = tokenize(renderer, dialogue)
            except UnrenderableError as error:
                raise DialogueError(f"{where}: {error}") from None
            fitting = [one for one in found if len(one.token_ids) <= max_tokens]
            num_too_long += len(found) - len(fitting)
            examples += fitting
            difficulty += [dialogue.difficulty] * len(fitting)
            on_dialogue()
        arrays |= _packed(part, examples, difficulty)
    beside = kept.with_name(f".{kept.stem}.{os.getpid()}.npz")
    np.savez(beside, num_too_long=num_too_long, **arrays)  # type: ignore[arg-type]
    beside.rename(kept)


def _packed(part: str, examples: Sequence[Example], difficulty: Sequence[float]) -> dict[str, np.ndarray]:
    return {
        f"{part}/lengths": np.array([len(one.token_ids) for one in examples], np.int64),
        f"{part}/token_ids": np.concatenate([one.token_ids for one in examples] or [np.zeros(0, np.int32)]),
        f"{part}/weights": np.concatenate([one.weights for one in examples] or [np.zeros(0, np.float32)]),
        f"{part}/ids": np.array([one.id for one in examples], np.str_),
        f"{part}/clusters": np.array([one.cluster for one in examples], np.str_),
        f"{part}/is_call": np.array([bool(one.is_call) for one in examples], np.bool_),
        f"{part}/difficulty": np.array(difficulty, np.float64),
    }


def _unpacked(found: "np.lib.npyio.NpzFile", part: str) -> tuple[list[Example], list[float]]:
    ends = np.cumsum(found[f"{part}/lengths"])[:-1]
    columns = zip(
        found[f"{part}/ids"].tolist(),
        np.split(found[f"{part}/token_ids"], ends),
        np.split(found[f"{part}/weights"], ends),
        found[f"{part}/clusters"].tolist(),
        found[f"{part}/is_call"].tolist(),
        strict=False,  # of nothing np.split makes one empty part
    )
    examples = [Example(one, ids, weights, cluster, is_call=call) for one, ids, weights, cluster, call in columns]
    return examples, found[f"{part}/difficulty"].tolist()


def _read(path: Path) -> Iterator[tuple[str, Dialogue]]:
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                yield where, _dialogue(line, f"{path.stem}-{number}")
            except (ValueError, RecursionError) as error:  # json.JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise DialogueError(f"{where}: {error}") from None
    if not number:
        raise DialogueError(f"{path} is empty: a data set has at least one line")


def _dialogue(line: bytes, name: str) -> Dialogue:
    """A generated one, or a plain line of OpenAI's form. Raises ValueError, RecursionError."""
    value = read_object(line)
    found = Dialogue.from_object(value) if "part" in value else _plain(value, name, difficulty=float(len(line)))
    _check(found)
    return found


def _plain(value: dict[str, Any], name: str, difficulty: float) -> Dialogue:
    """With our keys filled in."""
    messages, tools = value.get("messages"), value.get("tools") or []
    for key, found in (("messages", messages), ("tools", tools)):
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ValueError(f"'{key}' must be a list of objects")
    assert isinstance(messages, list)
    has_calls = any(message.get("tool_calls") for message in messages)
    return Dialogue(
        id=name,
        part="train",
        kind="tool_used" if has_calls else "no_tool",
        category="reasoning",
        family="",
        template=name,
        template_text="",
        subject="",
        augmentation="",
        difficulty=difficulty,
        expected=[],
        messages=messages,
        tools=tools,
    )


def _check(dialogue: Dialogue) -> None:
    """What the server would refuse, before anything is rendered. Raises ValueError naming the field."""
    if not any(message.get("role") == "assistant" for message in dialogue.messages):
        raise ValueError("'messages' has no assistant message to learn")
    # `weight` is OpenAI's fine-tuning format: requests may not have it.
    messages = [{key: value for key, value in one.items() if key != "weight"} for one in dialogue.messages]
    try:
        ChatRequest.model_validate({"model": "-", "messages": messages, "tools": dialogue.tools})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        arguments = parse_arguments(call["function"]["arguments"])
        if arguments is None:
            raise ValueError(f"the arguments of '{call['function']['name']}' are no JSON object")
        check_value(arguments)


def _is_held_out(dialogue: Dialogue) -> bool:
    """Of a single file: by what is said, so that equal dialogues are on one side."""
    said = json.dumps([dialogue.messages, dialogue.tools], sort_keys=True)
    drawn = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=4, person=b"held out").digest(), "big")
    return drawn < HELD_OUT_SHARE * 2**32
