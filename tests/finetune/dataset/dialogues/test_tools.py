"""Tools: what they say, what they refuse, and that their signatures and arguments are what OpenAI's clients expect."""

import json
import tomllib
from typing import Any

import jsonschema_rs
import pytest

from finetune.dataset.dialogues.drawing import Dice
from finetune.dataset.dialogues.examples import Dialogue
from finetune.dataset.dialogues.renaming import ShownTool, renamed
from finetune.dataset.dialogues.scenarios import HERE
from finetune.dataset.dialogues.tool import ArgumentsError, check_arguments, run_tool
from finetune.dataset.dialogues.toolbox import SEEN, TOOLS, UNSEEN
from server.openai.protocol.chat import ChatRequest

ANSWERS: list[tuple[str, dict[str, Any], Any]] = [
    ("arithmetic", {"operation": "divide", "a": 7, "b": 2}, 3.5),
    ("percent_of", {"percent": 15, "value": 240}, 36),
    ("percent_change", {"before": 80, "after": 60}, -25),
    ("statistics", {"numbers": [3, 1, 4, 1], "measure": "median"}, 2),
    ("root", {"value": 27, "degree": 3}, 3),
    ("root", {"value": 2}, 1.4142),
    ("least_common_multiple", {"a": 4, "b": 6}, 12),
    ("is_prime", {"number": 91}, False),
    ("prime_factors", {"number": 360}, [2, 2, 2, 3, 3, 5]),
    ("area", {"shape": "circle", "width": 2}, 3.1416),
    ("area", {"shape": "triangle", "width": 3, "height": 4}, 6),
    ("split_bill", {"total": 100, "people": 4, "tip_percent": 10}, 27.5),
    ("count_letter", {"text": "Bananas", "letter": "a"}, 3),
    ("is_palindrome", {"text": "No lemon, no melon"}, True),
    ("change_case", {"text": "Fresh rye bread", "style": "snake"}, "fresh_rye_bread"),
    ("sort_words", {"words": ["plum", "fig"]}, ["fig", "plum"]),
    ("split_text", {"text": "a;b", "separator": ";"}, ["a", "b"]),
    ("caesar_shift", {"text": "Zoo 9", "shift": 1}, "App 9"),
    ("convert_length", {"value": 3, "from_unit": "mi", "to_unit": "km"}, 4.828),
    ("convert_temperature", {"value": 212, "from_unit": "F", "to_unit": "C"}, 100),
    ("to_base", {"number": 255, "base": 16}, "ff"),
    ("from_base", {"digits": "1011", "base": 2}, 11),
    ("to_roman", {"number": 1994}, "MCMXCIV"),
    ("from_roman", {"numeral": "mcmxciv"}, 1994),
    ("days_between", {"start": "2024-02-28", "end": "2024-03-01"}, 2),
    ("add_days", {"date": "2023-12-31", "days": 1}, "2024-01-01"),
    ("weekday", {"date": "2024-02-29"}, "Thursday"),
    ("hex_to_rgb", {"color": "#FF8000"}, [255, 128, 0]),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("arithmetic", {"operation": "divide", "a": 7, "b": 0}, "zero"),
    ("root", {"value": -4}, "negative"),
    ("weekday", {"date": "2023-02-30"}, "2023-02-30"),
    ("from_base", {"digits": "129", "base": 8}, "'9'"),
    ("from_roman", {"numeral": "IIX"}, "IIX"),
    ("replace_text", {"text": "a sign", "old": "boat", "new": "car"}, "'boat'"),
    ("pick_word", {"text": "two words", "position": 3}, "2 words"),
]


@pytest.mark.parametrize(("name", "arguments", "result"), ANSWERS)
def test_a_tool_says_what_is_right(name: str, arguments: dict[str, Any], result: Any) -> None:
    assert json.loads(run_tool(TOOLS[name], arguments)) == {"result": result}


@pytest.mark.parametrize(("name", "arguments", "word"), REFUSED)
def test_a_refusal_names_the_reason(name: str, arguments: dict[str, Any], word: str) -> None:
    answer = json.loads(run_tool(TOOLS[name], arguments))
    assert list(answer) == ["error"]
    assert word in answer["error"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"value": 1, "from_unit": "m"}, "'to_unit' is missing"),
        ({"value": "1", "from_unit": "m", "to_unit": "km"}, "'value' must be of type number"),
        ({"value": True, "from_unit": "m", "to_unit": "km"}, "'value' must be of type number"),
        ({"value": 1, "from_unit": "parsec", "to_unit": "km"}, "'from_unit' must be one of mm, cm"),
        ({"value": 1, "from_unit": "m", "to_unit": "km", "digits": 2}, "no argument 'digits'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ArgumentsError, match=word):
        run_tool(TOOLS["convert_length"], arguments)


def test_the_signatures_are_ones_that_the_server_takes() -> None:
    tools = [tool.signature() for tool in TOOLS.values()]
    ChatRequest.model_validate({"model": "-", "messages": [{"role": "user", "content": "?"}], "tools": tools})
    for tool in tools:
        jsonschema_rs.meta.validate(tool["function"]["parameters"])
        assert tool["function"]["description"]
    assert len(SEEN) >= 25
    assert not set(SEEN) & set(UNSEEN)


def test_our_check_of_arguments_agrees_with_a_json_schema_library(tiny_dialogues: list[Dialogue]) -> None:
    # JSON Schema lets further keys pass unless it is told not to; ours refuses them.
    closed = {name: {**tool.parameters, "additionalProperties": False} for name, tool in TOOLS.items()}
    validators = {name: jsonschema_rs.validator_for(schema) for name, schema in closed.items()}
    num_checked = 0
    for one in tiny_dialogues:
        for call in one.own_calls:
            arguments = dict(call["arguments"])
            assert validators[call["name"]].is_valid(arguments)
            for name in arguments:  # and each way of breaking it
                for broken in ({**arguments, name: None}, {k: v for k, v in arguments.items() if k != name}):
                    num_checked += 1
                    try:
                        check_arguments(TOOLS[call["name"]].parameters, broken)
                        fits = True
                    except ArgumentsError:
                        fits = False
                    assert fits == validators[call["name"]].is_valid(broken), (call["name"], broken)
    assert num_checked > 1000


def test_renamed_tools_are_the_same_tools(tiny_dialogues: list[Dialogue]) -> None:
    trained: set[str] = set()
    for number, name in enumerate([*SEEN] * 20):
        tool, dice = TOOLS[name], Dice("rename", number)
        for held_out in (False, True):
            shown = renamed(tool, dice, held_out=held_out)
            own = {key: object() for key in tool.parameters["properties"]}
            assert len(set(shown.arguments.values())) == len(own), shown
            assert shown.own(shown.shown(own)) == own
            assert shown.is_renamed
            assert shown.name not in TOOLS
            assert ShownTool.from_alias(shown.name, shown.alias()) == shown
            jsonschema_rs.meta.validate(shown.signature()["function"]["parameters"])
            trained |= {shown.name} if not held_out else set()
            assert not (held_out and shown.name in trained)
    share = sum(bool(one.aliases) for one in tiny_dialogues if one.part == "train") / 600
    assert 0.1 < share < 0.3
    assert not any(one.aliases for one in tiny_dialogues if one.part in ("families", "unseen_tools", "fresh_values"))
    assert all(len(one.aliases) == len(one.tools) for one in tiny_dialogues if one.part == "renamed_tools")


def test_no_two_tools_share_a_name() -> None:
    names = [name for many in tomllib.loads((HERE / "aliases.toml").read_text())["tools"].values() for name in many]
    assert len(names) == len(set(names)) == 4 * len(SEEN)
