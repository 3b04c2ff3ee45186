"""What /v1/adapters answered, as tables and lines for people."""

import math
from collections.abc import Iterable
from typing import Any

from server.commands.table import print_table, printable
from server.units import format_bytes

_NOTHING = "-"


def show_list(adapters: list[Any]) -> None:
    if not adapters:
        print("no adapters")
        return
    header = ("name", "live", "canary", "shadow", "held back", "versions", "change")
    print_table(header, [_summary_row(adapter) for adapter in adapters])


def _summary_row(adapter: Any) -> tuple[Any, ...]:
    return (
        adapter["name"],
        adapter["live"] or "the base",
        _with_share(adapter["canary"], adapter["canary_share"]),
        _with_share(adapter["shadow"], adapter["shadow_share"]),
        _held_back(adapter),
        adapter["num_versions"],
        adapter["change"],
    )


def show_summary(adapter: Any) -> None:
    """One line: who answers now."""
    live = adapter["live"] or "the base"
    parts = [f"{live} answers"]
    for role in ("canary", "shadow"):
        if adapter[role]:
            parts.append(f"{role} {_with_share(adapter[role], adapter[f'{role}_share'])}")
    if adapter["hold_back_share"]:
        parts.append(f"held back on {_held_back(adapter)}")
    print(f"{adapter['name']}: {', '.join(parts)} (change {adapter['change']})")


def show_adapter(adapter: Any) -> None:
    show_summary(adapter)
    serving = adapter["serving"]
    if serving["live"] != adapter["live"]:
        print(f"this server still answers with {serving['live'] or 'the base'}")
    if serving["failure"] is not None:
        print(f"this server cannot load {serving['failure']['version']}: {printable(serving['failure']['reason'])}")
    print()
    header = ("version", "state", "rank", "size", "created (UTC)", "requests here", "marks", "origin")
    rows = [
        (
            version["version"],
            version["state"],
            version["rank"],
            format_bytes(version["size_bytes"]),
            _time(version["created_at"]),
            serving["num_requests"].get(version["version"], 0),
            _marks(version) or _NOTHING,
            version["origin"],
        )
        for version in adapter["versions"]
    ]
    print_table(header, rows)


def show_version(version: Any) -> None:
    facts = [
        (key.replace("_", " "), format_bytes(value) if key.endswith("_bytes") else _time(value) if key == "created_at"
         else _yes_or_no(value))
        for key, value in version.items()
        if key not in ("object", "adapter", "number") and value is not None
    ]  # fmt: skip
    print_table(None, facts)


def show_mark(version: Any) -> None:
    print(f"{version['version']}: {_marks(version) or 'not pinned'}")


def show_history(changes: list[Any]) -> None:
    header = ("change", "time (UTC)", "version", "action", "state", "share", "asked by", "reason")
    rows = [
        (
            change["number"],
            _time(change["at"]),
            change["version"] or change["adapter"],
            change["action"],
            change["to_state"] or _NOTHING,
            _NOTHING if change["share"] is None else _percent(change["share"]),
            change["asked_by"],
            change["reason"],
        )
        for change in changes
    ]
    print_table(header, rows)


def show_diff(diff: Any, each_layer: bool) -> None:
    """Norms of the change that each version makes to the base, and of the difference between the two."""
    left, right = diff["left"]["version"], diff["right"]["version"]
    if diff["left"]["digest"] == diff["right"]["digest"]:
        print(f"{left} and {right} are the same content")
        return
    if diff["config"]:
        rows = [(key, values["left"], values["right"]) for key, values in diff["config"].items()]
        print_table(("configuration", left, right), rows)
        print()
    matrices = diff["projections"]
    names = list(dict.fromkeys(row["projection"] for row in matrices))
    header = ("change of the base", left, right, "difference", "relative")
    lines = [_norms(name, (row for row in matrices if row["projection"] == name)) for name in names]
    if each_layer:
        lines = [_norms(f"layer {row['layer']} {row['projection']}", [row]) for row in matrices]
    print_table(header, [*lines, _norms("all", matrices)])


def _norms(name: str, rows: Iterable[Any]) -> tuple[str, ...]:
    """Frobenius norms of several matrices taken as one."""
    rows = list(rows)
    left, right, difference = (
        math.sqrt(sum(row[key] ** 2 for row in rows)) for key in ("left_norm", "right_norm", "difference_norm")
    )
    larger = max(left, right)
    relative = f"{100 * difference / larger:.1f} %" if larger else _NOTHING
    return name, f"{left:.4g}", f"{right:.4g}", f"{difference:.4g}", relative


def _with_share(version: str | None, share: float) -> str:
    return _NOTHING if version is None else f"{version} ({_percent(share)})"


def _held_back(adapter: Any) -> str:
    share = adapter["hold_back_share"]
    return _with_share(adapter["previous"] or "the base", share) if share else _NOTHING


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _marks(version: Any) -> str:
    words = [word for key, word in (("is_pinned", "pinned"), ("is_deleted", "deleted")) if version[key]]
    return ", ".join(words)


def _yes_or_no(value: Any) -> Any:
    return ("yes" if value else "no") if isinstance(value, bool) else value


def _time(text: str) -> str:
    """To the second; times are in UTC."""
    return text[:19].replace("T", " ")
