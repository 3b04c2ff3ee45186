"""The whole demonstration at a small size: real processes, the default model, forty questions made up here."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from finetune.dataset.bfcl import Question
from finetune.demo.demo import Options, run_demo
from finetune.demo.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

GOODS = [
    "apple", "bread", "butter", "candle", "carpet", "cement", "cheese", "clock", "coffee", "copper", "cotton",
    "diamond", "dress", "engine", "feather", "flour", "garlic", "glass", "gravel", "guitar", "hammer", "helmet",
    "honey", "jacket", "kettle", "ladder", "leather", "lemon", "mirror", "needle", "onion", "paper", "pearl",
    "pepper", "pillow", "potato", "ribbon", "saddle", "silver", "tomato",
]  # fmt: skip
SMALL = ("--min-clusters", "8", "--min-stratum-clusters", "4", "--gate-max-tokens", "48", "--gate-concurrency", "8")


def question(number: int, goods: str) -> Question:
    parameters = {
        "type": "object",
        "properties": {"kilos": {"type": "number", "description": "How many."}},
        "required": ["kilos"],
    }
    function = {"name": goods, "description": f"Tells what {goods} costs.", "parameters": parameters}
    text = f"I want {number + 2} kilos of {goods}: how much money must I bring?"
    tools = [{"type": "function", "function": function}]
    return Question(f"made_{number}", "simple_python", text, tools, [{goods: {"kilos": [number + 2]}}], number)


def test_a_round_goes_live_and_the_plain_recipe_does_not(tmp_path: Path, default_model: Path) -> None:
    folder = tmp_path / "demo"
    options = Options(
        folder=folder,
        model=str(default_model),
        questions=[question(number, goods) for number, goods in enumerate(GOODS)],
        misfit_share=0.0,  # forty questions of one kind do not teach what fits; that chat is something else they do
        num_chats=60,  # a drawn third is held out: of 60 practically never fewer than four, of 30 once in 150 logs
        tools=Recipe(
            (
                *("--epochs", "2", "--tokens-per-step", "512", "--micro-batch-tokens", "512"),
                *("--learning-rate", "1e-3", "--general-prompts", "2", "--canary-share", "0.5", *SMALL),
            )
        ),
        plain=Recipe(("--epochs", "2", "--tokens-per-step", "512", "--general-prompts", "0", *SMALL)),
    )
    result = run_demo(options)
    rows = {(row["group"], row["metric"]): row for row in result["rows"]}
    right = rows["gold", "exactly_right"]
    assert right["before"]["value"] == 0.0
    assert right["after"]["value"] >= 0.5
    assert rows["gold", "no_call"]["after"]["value"] >= 0.8
    assert result["plain_result"] == "rejected"
    assert result["result"] == "canary"
    assert result["is_live"]
    assert not [one["fault"] for one in result["traffic"]["answered"] if one["fault"]]
    assert {one["version"] for one in result["traffic"]["answered"]} == {"base", "tools@1"}
    assert ET.parse(folder / "picture.svg").getroot().tag.endswith("svg")
    assert "exactly right" in (folder / "report.md").read_text()
    assert "plain@1 against" in (folder / "round-plain-r1.md").read_text()
