"""Takes secrets out of what is about to be written. Runs on the writer's thread, before any byte reaches the database.

Three sources: patterns of well-known credentials, the literal secrets that this server itself knows (its upstream's
key), and the operator's own rules. Every string value of messages, tools, answers and client fields passes through; a
trace in which something was replaced is stored without token ids, which would spell the secret out again.
Not covered: secrets that look like words, text split over two messages, and prompts given as token ids, which are read
by nobody here (they go when something else of their trace is replaced).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import ConfigError

# (name, literals of which one must occur for the pattern to be tried: `in` is a hundred times faster, pattern)
_KNOWN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("api_key", ("sk-",), r"\bsk-[A-Za-z0-9_-]{20,}"),  # ours, OpenAI's, Anthropic's
    ("aws_key", ("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    ("aws_secret", ("aws_secret",), r"(?<=aws_secret_access_key)(?:[\"'\s:=\\]{1,8})[A-Za-z0-9/+]{40}"),
    ("github_token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    ("github_token", ("github_pat_",), r"\bgithub_pat_[A-Za-z0-9_]{22,}"),
    ("gitlab_token", ("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("slack_token", ("xox",), r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    ("google_key", ("AIza",), r"\bAIza[A-Za-z0-9_-]{35}"),
    ("huggingface_token", ("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
    ("stripe_key", ("_live_", "_test_"), r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"),
    ("jwt", ("eyJ",), r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    ("bearer_token", ("earer ",), r"\b[Bb]earer [A-Za-z0-9._~+/-]{20,}=*"),
    ("url_password", ("://",), r"(?<=://)[^/\s:@\"']{1,64}:[^/\s:@\"']{1,128}(?=@)"),
    (
        "private_key",
        ("PRIVATE KEY-----",),
        r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,32}PRIVATE KEY-----|\Z)",
    ),
)


@dataclass(frozen=True, slots=True)
class RedactionRule:
    """An operator's rule: every match of `pattern` (Python's `re`) becomes `replacement`, taken literally."""

    pattern: str
    replacement: str = "[redacted]"


@dataclass(frozen=True, slots=True)
class _Step:
    literals: tuple[str, ...]
    """Empty: always tried."""
    pattern: re.Pattern[str]
    replacement: str


class Redactor:
    """Immutable once made. Raises ConfigError for a rule that is no regular expression."""

    def __init__(self, rules: Sequence[RedactionRule] = (), *, secrets: Iterable[str] = ()) -> None:
        steps = [
            _Step((secret,), re.compile(re.escape(secret)), "[redacted:secret]")
            for secret in sorted(set(secrets), key=len, reverse=True)
            if secret
        ]
        steps += [
            _Step(literals, re.compile(pattern, re.DOTALL), f"[redacted:{name}]") for name, literals, pattern in _KNOWN
        ]
        steps += [_Step((), _compiled(rule.pattern), rule.replacement) for rule in rules]
        self._steps = tuple(steps)

    def redact(self, value: Any) -> tuple[Any, bool]:
        """The JSON value with every string in it cleaned, and whether anything changed (if not: `value` itself)."""
        if isinstance(value, str):
            cleaned = self._clean(value)
            return cleaned, cleaned != value
        if isinstance(value, Mapping):
            pairs = {key: self.redact(item) for key, item in value.items()}
            if not any(changed for _, changed in pairs.values()):
                return value, False
            return {key: item for key, (item, _) in pairs.items()}, True
        if isinstance(value, list | tuple) and not {*map(type, value)} <= {int, float}:  # token ids
            items = [self.redact(item) for item in value]
            if not any(changed for _, changed in items):
                return value, False
            return [item for item, _ in items], True
        return value, False

    def _clean(self, text: str) -> str:
        for step in self._steps:
            if not step.literals or any(literal in text for literal in step.literals):
                replacement = step.replacement
                text = step.pattern.sub(lambda _, new=replacement: new, text)  # type: ignore[misc]
        return text


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"redaction rule {pattern!r} is not a regular expression: {error}") from None
