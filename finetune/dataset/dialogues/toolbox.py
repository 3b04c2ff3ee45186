"""All tools by name, and which of them training never sees.

The unseen ones are like seen ones in shape (a conversion, a count, two whole numbers), so that calling them asks for
reading the signature and not for guessing it. They are offered in the held-out part "unseen_tools" alone: not even as
distractors elsewhere.
"""

from collections.abc import Mapping
from types import MappingProxyType

from finetune.dataset.dialogues import conversion_tools, math_tools, text_tools
from finetune.dataset.dialogues.tool import Tool

TOOLS: Mapping[str, Tool] = MappingProxyType(
    {tool.name: tool for tool in (*math_tools.TOOLS, *text_tools.TOOLS, *conversion_tools.TOOLS)}
)
UNSEEN: tuple[str, ...] = (
    "least_common_multiple",
    "prime_factors",
    "count_vowels",
    "repeat_text",
    "convert_speed",
    "convert_data",
    "from_roman",
)
SEEN: tuple[str, ...] = tuple(name for name in TOOLS if name not in UNSEEN)

UNIVERSAL = frozenset({"arithmetic", "statistics", "round_number"})
"""Tools with which a clever caller could do what another is for: not offered where "no tool fits" is the answer."""
