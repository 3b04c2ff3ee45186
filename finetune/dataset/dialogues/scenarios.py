"""Scenario families: the world that a request comes from, and the unit of the held-out split.

Read from scenarios.toml. A family is in training, in validation or held out as a whole, for every seed, so that models
trained on different sets can be compared.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

HERE = Path(__file__).parent
Split = Literal["train", "validation", "held_out"]
_WORDS = ("place", "person", "things", "event", "long", "heavy", "liquid", "hot")


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    split: Split
    words: Mapping[str, Sequence[str]]
    scenes: Sequence[str]
    """Its own, and those that every family shares."""
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Scenarios:
    families: Mapping[str, Family]
    tails: Sequence[str]

    def of(self, split: Split) -> list[Family]:
        return [family for family in self.families.values() if family.split == split]


@cache
def scenarios() -> Scenarios:
    content = tomllib.loads((HERE / "scenarios.toml").read_text("utf-8"))
    shared = content["scenes"]
    families = {
        one["name"]: Family(
            name=one["name"],
            split=one.get("split", "train"),
            words={key: tuple(one[key]) for key in _WORDS},
            # A family's own scenes are as likely as the shared ones, though there are fewer.
            scenes=(*one["scenes"] * (len(shared) // len(one["scenes"])), *shared),
            facts=[(question, answer) for question, answer in one["facts"]],
        )
        for one in content["family"]
    }
    return Scenarios(families, content["tails"])
