"""A round for people and for machines: what it learned from, how training went, what the gate decided and why.

Not here: the gate's own page (finetune/gate/report.py), which is part of it.
"""

from collections.abc import Mapping
from typing import Any

from finetune.gate.report import report as gate_report
from finetune.rounds.gating import decision_of
from finetune.rounds.round import Round


def round_body(round: Round) -> dict[str, Any]:
    """Everything, as JSON."""
    return {
        "object": "round",
        "id": str(round.ref),
        "adapter": round.ref.adapter,
        "number": round.ref.number,
        "phase": round.phase,
        "result": round.result,
        "reason": round.reason,
        "cause": round.cause,
        "parent": None if round.parent is None else f"{round.ref.adapter}@{round.parent}",
        "version": None if round.version is None else str(round.version_ref),
        "snapshot": round.snapshot,
        "base_digest": round.base_digest,
        "num_restarts": round.num_restarts,
        "settings": dict(round.settings),
        "facts": dict(round.facts),
        "decision": None if round.decision is None else dict(round.decision),
        "created_at": round.created_at.isoformat(),
        "updated_at": round.updated_at.isoformat(),
    }


def round_page(round: Round) -> str:
    """Markdown."""
    state = round.result or f"in phase {round.phase}"
    lines = [f"# Round {round.ref}: {state.replace('_', ' ')}", ""]
    if round.reason:
        lines += [round.reason, ""]
    facts = [("begun", f"{round.created_at:%Y-%m-%d %H:%M:%S} UTC, {round.cause}")]
    facts.append(("from", "the base" if round.parent is None else f"{round.ref.adapter}@{round.parent}"))
    facts.append(("base", round.base_digest))
    if round.snapshot is not None:
        facts.append(("snapshot", round.snapshot))
    if round.version_ref is not None:
        facts.append(("version", str(round.version_ref)))
    if round.num_restarts:
        facts.append(("begun anew", f"{round.num_restarts} times"))
    lines += [f"- {name}: {value}" for name, value in facts]
    lines += _of_snapshot(round.facts.get("snapshot", {})) + _of_training(round.facts.get("train", {}))
    lines.append("")
    if round.decision is not None:
        lines.append(gate_report(decision_of(round)))
    return "\n".join(lines).rstrip() + "\n"


def _of_snapshot(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    if facts.get("kept"):
        lines.append("- examples: " + ", ".join(f"{count} {part}" for part, count in facts["kept"].items()))
    for part, reasons in facts.get("dropped", {}).items():
        if reasons:
            lines.append(f"- dropped ({part}): " + ", ".join(f"{count} {why}" for why, count in reasons.items()))
    return lines


def _of_training(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    text = f"- training: {facts['num_steps']} steps, {facts['num_tokens']} tokens, loss {facts['first_loss']:.4f}"
    lines = [f"{text} at first, {facts['last_loss']:.4f} at last", *([] if facts["is_exact"] else [_INEXACT])]
    if "num_pairs" in facts:
        lines.append(f"- preference pairs: {facts['num_pairs']}")
    if "validation" in facts:
        found = facts["validation"]
        best = f"best loss {found['best_loss']:.4f} after step {found['best_step']}, which is exported"
        stopped = "; training stopped early" if found["stopped_early"] else ""
        lines.append(f"- validation on {found['num_examples']} examples of the training side: {best}{stopped}")
    return lines


_INEXACT = "- resumed on another kind of machine: equal within tolerance, not bit for bit"
