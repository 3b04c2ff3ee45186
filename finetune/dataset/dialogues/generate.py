"""Writes a data set: a folder of JSON lines and a manifest, made in one pass from a seed, whole or not there at all.

    train.jsonl        training families, seen tools
    validation.jsonl   validation families: for decisions while training
    held_out.jsonl     parts "families" (held-out families, seen tools), "unseen_tools" (held-out families, tools that
                       training never sees), "renamed_tools" (held-out families, seen tools under names that training
                       never sees) and "fresh_values" (training templates, values that training never sees)
    manifest.json      what it was made from, rows and digest of each file, digest of the whole

The same options give the same bytes, on every machine. Memory holds the templates and argument values, never the
examples.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.dataset.dialogues.augment import AUGMENTATIONS
from finetune.dataset.dialogues.dialogue import make_dialogue
from finetune.dataset.dialogues.drawing import Pool
from finetune.dataset.dialogues.examples import Dialogue
from finetune.dataset.dialogues.templates import Part, Template, make_templates
from finetune.dataset.dialogues.toolbox import SEEN, UNSEEN
from finetune.dataset.errors import DialogueError
from finetune.dataset.jsonl import write_file

FORMAT = 1
MANIFEST = "manifest.json"
FILES = ("train.jsonl", "validation.jsonl", "held_out.jsonl")
MIN_TEMPLATES = 100
"""Fewer do not hold every tool once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    templates: int = 3000
    """Of training. The other parts have a share of it."""
    seed: int = 0
    thinking: bool = False
    renamed: float = 0.25
    """Share of the examples of training and validation that offer tools under other names."""

    def __post_init__(self) -> None:
        if self.templates < MIN_TEMPLATES:
            raise DialogueError(
                f"at least {MIN_TEMPLATES} templates are needed to have every tool, not {self.templates}"
            )

        if not 0 <= self.renamed <= 1:
            raise DialogueError(f"the share of renamed tools lies between 0 and 1, not {self.renamed}")

    @property
    def counts(self) -> Mapping[Part, int]:
        """Templates of each part."""
        small = max(20, self.templates // 15)
        return {
            "train": self.templates,
            "validation": small,
            "families": max(40, self.templates // 5),
            "unseen_tools": small,
            "renamed_tools": small,
        }

    @property
    def num_fresh(self) -> int:
        return max(20, self.templates // 15)


def generate(out: Path, options: Options, *, on_template: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The manifest. Raises DialogueError when `out` is there already; nothing is left of a run that fails."""
    if out.exists():
        raise DialogueError(f"{out} is there already; remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{out.name}-", dir=out.parent))
    try:
        manifest = _write(partial, options, on_template)
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(folder: Path, options: Options, on_template: Callable[[], None]) -> dict[str, Any]:
    train: list[Template] = []
    seen: set[tuple[str, str]] = set()
    with _open(folder / FILES[0]) as first, _open(folder / FILES[1]) as second, _open(folder / FILES[2]) as third:
        files = {"train": first, "validation": second, "families": third, "unseen_tools": third, "renamed_tools": third}
        for template in make_templates(options.counts, options.seed):
            for dialogue in _augmented(template, options):
                files[template.part].write(dialogue.to_line())
                if template.part == "train":
                    seen |= values_of(dialogue.own_calls)
            if template.part == "train":
                train.append(template)
            on_template()
        for dialogue in _fresh(train, seen, options):
            third.write(dialogue.to_line())
        made = zip(FILES, (first, second, third), strict=True)
        written = {name: {"rows": file.rows, "sha256": file.sha256} for name, file in made}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "options": asdict(options),
        "templates": {**options.counts, "fresh_values": options.num_fresh},
        "seen_tools": list(SEEN),
        "unseen_tools": list(UNSEEN),
        "files": written,
    }
    manifest["digest"] = digest_of(manifest)
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Of everything but the digest itself; the files are in it by theirs."""
    facts = {key: value for key, value in manifest.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def values_of(calls: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Every argument value with its tool, as JSON."""
    return {(call["name"], json.dumps(value)) for call in calls for value in call["arguments"].values()}


def _augmented(template: Template, options: Options) -> Iterator[Dialogue]:
    pool: Pool = "train" if template.part == "train" else "any"
    share = options.renamed if template.part in ("train", "validation") else 0.0
    for augmentation in AUGMENTATIONS:
        made = make_dialogue(
            template, augmentation, options.seed, thinking=options.thinking, pool=pool, renamed_share=share
        )
        if made is None:
            raise DialogueError(f"{template.id}: no value is left in the range of '{template.request}'")
        yield made


def _fresh(train: list[Template], seen: Set[tuple[str, str]], options: Options) -> Iterator[Dialogue]:
    """Templates that call a tool, each once, of tools in turn; those whose values cannot be fresh are passed over."""
    by_group: dict[str, list[Template]] = {}
    for template in train:
        if template.subject.steps:
            by_group.setdefault(template.subject.group, []).append(template)
    kinds = list(AUGMENTATIONS)
    num_made, rank = 0, 0
    while num_made < options.num_fresh * len(kinds) and any(rank < len(many) for many in by_group.values()):
        for many in by_group.values():
            for template in many[rank : rank + 1]:
                augmentation = kinds[num_made % len(kinds)]
                made = make_dialogue(
                    template, augmentation, options.seed, thinking=options.thinking, pool="fresh", part="fresh_values"
                )
                is_fresh = made is not None and not values_of(made.own_calls[:1]) <= seen
                if made is not None and is_fresh and num_made < options.num_fresh * len(kinds):
                    yield made
                    num_made += 1
        rank += 1


class _File:
    """Counts and digests what is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.rows = 0

    def write(self, line: bytes) -> None:
        self._file.write(line)
        self._digest.update(line)
        self.rows += 1

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def _open(path: Path) -> Iterator[_File]:
    file = _File(path)
    try:
        yield file
    finally:
        file.close()
