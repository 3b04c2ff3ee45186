"""The quality report of a data set: every line checked, the set measured, and a verdict.

One pass over the files, and the set's templates compared with each other. What fails is a check with a count and the
first example of it; a line that cannot be read at all is an error of its own (examples.py). The bounds are what a set
from the generator keeps with room to spare, and what a set with a fault breaks.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.dataset.dialogues.distinct import DistinctSets
from finetune.dataset.dialogues.examples import Dialogue, check_value, read_dialogues, shown_tool
from finetune.dataset.dialogues.generate import FILES, MANIFEST, digest_of, values_of
from finetune.dataset.dialogues.scenarios import scenarios
from finetune.dataset.dialogues.templates import SHARES, THRESHOLD
from finetune.dataset.dialogues.toolbox import SEEN, UNSEEN
from finetune.dataset.dialogues.verify import form_problem, result_problem
from finetune.dataset.dialogues.wording import masked_tokens
from finetune.dataset.errors import DialogueError
from finetune.dataset.jsonl import file_digest

MAX_REQUEST_CHARACTERS = 600
MAX_DUPLICATE_SHARE = 0.01
"""Of requests that say word for word what another one says (a question without slots has few other ways)."""
NGRAM_SAMPLE = 500
"""Requests, of different templates, in which n-grams are counted: more of them would always repeat more."""
MIN_DISTINCT = {1: 0.10, 2: 0.38, 3: 0.60}
"""Distinct n-grams by all n-grams of the sample."""
SHARE_TOLERANCE = 0.02
CATEGORY_RANGE = (0.2, 0.5)
"""Of math, text and conversions among the examples with a successful call."""
MAX_FAMILY_RATIO = 1.5
"""The largest family by the smallest of a part."""
_WRONG_SPLIT = {"train": "train", "fresh_values": "train", "validation": "validation", "families": "held_out",
                "unseen_tools": "held_out", "renamed_tools": "held_out"}  # fmt: skip


@dataclass(slots=True)
class Check:
    name: str
    num_bad: int = 0
    detail: str = ""
    """The first thing that is bad, or the measured value."""

    def fail(self, detail: str) -> None:
        self.num_bad += 1
        if self.num_bad == 1:
            self.detail = detail


@dataclass
class _Part:
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    templates: dict[str, str] = field(default_factory=dict)  # id: text
    lengths: list[int] = field(default_factory=list)


class _Set:
    """What one pass over the files finds."""

    def __init__(self) -> None:
        self.checks: dict[str, Check] = {}
        self.parts: defaultdict[str, _Part] = defaultdict(_Part)
        self.requests: dict[str, str] = {}  # request: the part of the first that said it
        self.num_requests = 0
        self.ids: set[str] = set()
        self.values: set[tuple[str, str]] = set()  # tool and argument value, of training
        self.names: set[str] = set()  # under which training offers tools
        self.sample: list[str] = []

    def check(self, name: str) -> Check:
        return self.checks.setdefault(name, Check(name))

    def add(self, one: Dialogue, where: str) -> None:
        part = self.parts[one.part]
        problem = form_problem(one)
        self._note("schema valid", problem, where)
        if problem is None:
            self._note("tool results verified", _result_problem(one), where)
        self._note("ids are unique", f"'{one.id}' again" if one.id in self.ids else None, where)
        self.ids.add(one.id)
        self._note("split by families", self._family_problem(one), where)
        part.rows += 1
        part.kinds[one.kind] += 1
        part.categories[one.category] += 1
        part.families[one.family] += 1
        is_first = one.template not in part.templates
        part.templates.setdefault(one.template, one.template_text)
        if problem is not None:  # there may be no request
            return
        self._note("unseen tools unseen", _unseen_problem(one), where)
        self._note("renamed tools renamed", self._renaming_problem(one), where)
        self._overlap(one, where)
        if is_first and one.part == "train" and len(self.sample) < NGRAM_SAMPLE:
            self.sample.append(one.request)
        part.tools.update(str(call["name"]) for call in one.own_calls)
        part.lengths.append(len(one.request))
        too_long = len(one.request) > MAX_REQUEST_CHARACTERS
        self._note("request length", f"a request of {len(one.request)} characters" if too_long else None, where)

    def _note(self, name: str, problem: str | None, where: str) -> None:
        check = self.check(name)
        if problem is not None:
            check.fail(f"{where}: {problem}")

    def _family_problem(self, one: Dialogue) -> str | None:
        family = scenarios().families.get(one.family)
        if family is None:
            return f"there is no family '{one.family}'"
        wanted = _WRONG_SPLIT[one.part]
        return None if family.split == wanted else f"the family '{one.family}' is of '{family.split}', not '{wanted}'"

    def _renaming_problem(self, one: Dialogue) -> str | None:
        offered = {tool["function"]["name"] for tool in one.tools}
        if one.part == "train":
            self.names |= offered
        elif one.part == "renamed_tools" and (known := sorted(offered & self.names)):
            return f"training offers a tool under the name '{known[0]}'"
        return None

    def _overlap(self, one: Dialogue, where: str) -> None:
        first = self.requests.setdefault(one.request, one.part)
        other = f"the request is also in '{first}'" if first != one.part else None
        self._note("no overlap of parts", other, where)
        self.num_requests += 1
        if one.part == "train":
            self.values |= values_of(one.own_calls)
        elif one.part == "fresh_values":
            is_fresh = not values_of(one.own_calls[:1]) <= self.values
            self._note("fresh values are fresh", None if is_fresh else "training has all its values", where)


def _result_problem(one: Dialogue) -> str | None:
    try:
        return result_problem(one)
    except (ValueError, ArithmeticError) as error:  # values that no example has: 1e308 grams, an empty separator
        return f"a tool cannot take its arguments: {error}"


def _unseen_problem(one: Dialogue) -> str | None:
    offered = {shown_tool(one, tool["function"]["name"]).tool.name for tool in one.tools}
    if one.part == "unseen_tools":
        called = [call["name"] for call in one.own_calls if call["name"] not in UNSEEN]
        return f"it calls '{called[0]}', which training sees" if called else None
    shown = sorted(offered & set(UNSEEN))
    return f"'{shown[0]}' is offered" if shown else None


@dataclass(frozen=True, slots=True)
class Report:
    checks: list[Check]
    stats: dict[str, Any]

    @property
    def ok(self) -> bool:
        return not any(check.num_bad for check in self.checks)

    def body(self) -> dict[str, Any]:
        checks = [
            {"name": check.name, "ok": not check.num_bad, "num_bad": check.num_bad, "detail": check.detail}
            for check in self.checks
        ]
        return {"ok": self.ok, "checks": checks, **self.stats}


def report(folder: Path, *, on_line: Callable[[], None] = lambda: None) -> Report:
    """Raises DialogueError for a file or line that cannot be read."""
    manifest = read_manifest(folder)
    found = _Set()
    digests = Check("digests as in the manifest")
    for name in FILES:
        for number, one in enumerate(read_dialogues(folder / name), 1):
            found.add(one, f"{name}, line {number}")
            on_line()
        if file_digest(folder / name) != manifest["files"][name]["sha256"]:
            digests.fail(f"{name} is not the file that was written")
    if manifest["digest"] != digest_of(manifest):
        digests.fail(f"{MANIFEST} was changed")
    measured = [digests, _templates_apart(found), _duplicates(found), *_distinct_ngrams(found), *_balance(found)]
    measured.append(_enough(found, manifest))
    return Report([*found.checks.values(), *measured], _stats(found, manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        _check_manifest(manifest)
    except FileNotFoundError:
        raise DialogueError(
            f"{folder} is no data set: it has no {MANIFEST}; `sterna dataset generate` makes one"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DialogueError(f"{folder / MANIFEST} cannot be read: {error}") from None
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raises ValueError."""
    if not isinstance(manifest, dict) or not {"digest", "files", "options", "templates"} <= manifest.keys():
        raise ValueError("its keys are not those of a data set")
    for name, kind in (("digest", str), ("files", dict), ("options", dict), ("templates", dict)):
        if not isinstance(manifest[name], kind):
            raise ValueError(f"'{name}' must be {'a string' if kind is str else 'an object'}")
    for name in FILES:
        entry = manifest["files"].get(name)
        if not isinstance(entry, dict) or type(entry.get("rows")) is not int or type(entry.get("sha256")) is not str:
            raise ValueError(f"'files' must give the 'rows' and 'sha256' of '{name}'")
    check_value(manifest)


def _templates_apart(found: _Set) -> Check:
    """All templates of all parts; fresh values are of training templates."""
    check, known = Check("templates distinct"), DistinctSets(THRESHOLD)
    names: list[str] = []
    for part in ("train", "validation", "families", "unseen_tools", "renamed_tools"):
        for name, text in found.parts[part].templates.items():
            tokens = masked_tokens(text)
            near = known.near(tokens)
            if near is not None:
                check.fail(f"{name} is near to {names[near]}: '{text:.60}'")
            known.add(tokens)
            if len(known) > len(names):
                names.append(name)
    check.detail = check.detail or f"{len(known)} templates, any two below {THRESHOLD}"
    return check


def _duplicates(found: _Set) -> Check:
    check = Check("duplicate requests")
    share = 1 - len(found.requests) / max(1, found.num_requests)
    if share > MAX_DUPLICATE_SHARE:
        check.fail(f"{share:.2%} of the requests are said twice, at most {MAX_DUPLICATE_SHARE:.0%} are accepted")
    check.detail = check.detail or f"{share:.2%}"
    return check


def _distinct_ngrams(found: _Set) -> Iterator[Check]:
    for size, least in MIN_DISTINCT.items():
        check, value = Check(f"distinct-{size}"), distinct_n(found.sample, size)
        if value < least:
            check.fail(f"{value:.3f} is below {least}")
        check.detail = check.detail or f"{value:.3f} in {len(found.sample)} requests"
        yield check


def distinct_n(texts: list[str], size: int) -> float:
    """Distinct n-grams of words by all n-grams."""
    seen: set[tuple[str, ...]] = set()
    count = 0
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[start:] for start in range(size)), strict=False))
        seen.update(grams)
        count += len(grams)
    return len(seen) / count if count else 0.0


def _balance(found: _Set) -> Iterator[Check]:
    kinds, families, categories = (
        Check("kinds in balance"),
        Check("families in balance"),
        Check("categories in balance"),
    )
    tools = Check("every seen tool is called")
    for name in ("train", "validation", "families"):
        part = found.parts[name]
        for kind, wanted in SHARES.items():
            share = part.kinds[kind] / max(1, part.rows)
            if abs(share - wanted) > max(SHARE_TOLERANCE, 1 / max(1, len(part.templates))):
                kinds.fail(f"{share:.1%} of '{name}' are {kind}, {wanted:.0%} are wanted")
        counts = part.families.values()
        if not counts or max(counts) > MAX_FAMILY_RATIO * min(counts):
            families.fail(f"'{name}' has {dict(part.families)}")
    train = found.parts["train"]
    done = [train.categories[category] for category in ("math", "text", "conversions")]
    for category, count in zip(("math", "text", "conversions"), done, strict=True):
        if not CATEGORY_RANGE[0] <= count / max(1, sum(done)) <= CATEGORY_RANGE[1]:
            categories.fail(f"{count} of {sum(done)} successful calls in 'train' are of '{category}'")
    for tool in SEEN:
        if not train.tools[tool]:
            tools.fail(f"'{tool}' is never called in 'train'")
    yield from (kinds, families, categories, tools)


def _enough(found: _Set, manifest: Mapping[str, Any]) -> Check:
    check = Check("as many templates as were asked for")
    for part, count in manifest["templates"].items():
        if part != "fresh_values" and len(found.parts[part].templates) != count:
            check.fail(f"'{part}' has {len(found.parts[part].templates)} templates, not {count}")
    return check


def _stats(found: _Set, manifest: Mapping[str, Any]) -> dict[str, Any]:
    def part(one: _Part) -> dict[str, Any]:
        lengths = sorted(one.lengths) or [0]  # none: no line has the right form
        return {
            "rows": one.rows,
            "templates": len(one.templates),
            "kinds": dict(one.kinds),
            "categories": dict(one.categories),
            "families": dict(one.families),
            "calls": dict(one.tools.most_common()),
            "request_characters": {
                "median": lengths[len(lengths) // 2],
                "p95": lengths[len(lengths) * 95 // 100],
                "max": lengths[-1],
            },
        }

    return {
        "digest": manifest["digest"],
        "options": manifest["options"],
        "parts": {name: part(one) for name, one in found.parts.items() if one.rows},
    }
