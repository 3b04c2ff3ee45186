"""The committed lists of everyday prompts: what must not be forgotten, and by what forgetting is measured.

`general_prompts.txt` is trained on (the base's own answers, KL to the base; every second one asks for a form: one word,
a number, a list, of which a model that learns to call forgets most), `chat_prompts.txt` is ordinary chat for
the demonstration, `finetune/gate/regression_prompts.txt` is the gate's, with the form that its answers should have. No
prompt nearly equals one of another list: a test says so.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from finetune.dataset.errors import SnapshotError

_HERE = Path(__file__).parent
GENERAL = _HERE / "general_prompts.txt"
CHAT = _HERE / "chat_prompts.txt"
REGRESSION = _HERE.parent / "gate" / "regression_prompts.txt"

Form = Literal["text", "word", "yes_no", "number", "list"]
MAX_WORDS = 3
"""Of an answer that should be one word: "It is green." still shows that the form was understood."""

_CALL_MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '{"name":')
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_NUMBER = re.compile(r"\d|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|sixty)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RegressionPrompt:
    text: str
    form: Form


def read_prompts(path: Path = GENERAL) -> list[str]:
    """One a line."""
    return [line for line in path.read_text("utf-8").splitlines() if line]


def read_regression_prompts(path: Path = REGRESSION) -> list[RegressionPrompt]:
    """`form<TAB>prompt` a line."""
    found = []
    for line in read_prompts(path):
        form, tab, text = line.partition("\t")
        if not tab or form not in get_args(Form):
            raise SnapshotError(
                f"{path}: {line[:60]!r} does not begin with one of {', '.join(get_args(Form))} and a tab"
            )
        found.append(RegressionPrompt(text, cast(Form, form)))
    return found


def has_form(answer: str, form: Form) -> bool:
    """Whether an answer looks as it was asked to; whether it is true is not looked at."""
    text = answer.strip()
    if not text or any(mark in text for mark in _CALL_MARKS):
        return False
    match form:
        case "word":
            return len(text.split()) <= MAX_WORDS
        case "yes_no":
            return re.match(r"(?:yes|no)\b", text, re.IGNORECASE) is not None
        case "number":
            return _NUMBER.search(text) is not None and len(text.split()) <= 4 * MAX_WORDS
        case "list":
            return len(_ITEM.findall(text)) >= 2
        case "text":
            return len(text.split()) >= 4
