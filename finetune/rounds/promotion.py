"""A round's acts on the registry, over the admin API: bring the version in, let it begin as a canary, or reject it.

Each may be repeated: the registry is looked at first, and what it says already is not asked for again. An act names
the state that it was decided on (`expected_change`), so that of two who decide at once one is refused and looks again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.gate.decision import Outcome
from finetune.rounds.engine import Done, Over, Task
from finetune.rounds.errors import CanaryHeldError, RoundError
from finetune.rounds.gating import decision_of
from finetune.rounds.round import Phase, Result, Round
from finetune.serving.api import ServerApi
from finetune.serving.errors import RefusedError
from server.adapters.version import VersionRef
from server.traces.lineage import Lineage

MAX_TRIES = 5
"""Somebody who changes an adapter five times while we look is not done yet."""


def take_in(task: Task, api: ServerApi, lineage: Lineage, archive: Path) -> Done:
    """Raises RoundError, RefusedError, ServerDownError."""
    round = task.round
    assert round.snapshot is not None
    api.create_adapter(round.ref.adapter, f"{round.ref}")
    parent = None if round.parent is None else VersionRef(round.ref.adapter, round.parent)
    version = api.import_version(
        round.ref.adapter,
        archive,
        base_digest=round.base_digest,
        origin=str(round.ref),
        reason=f"{round.ref} trained it on snapshot {round.snapshot}",
        parent=parent,
    )
    lineage.add_version(round.ref.adapter, version["number"], round.snapshot, parent=round.parent)
    if version["state"] != "candidate":
        raise RoundError(f"the training gave {version['version']} again, which is {version['state']}")
    # What an attempt brought in that was begun anew since: it learned from what was deleted.
    abandon(api, round, f"{round.ref} began anew: {round.reason}", keep=version["number"])
    facts = {"digest": version["digest"], "rank": version["rank"], "size_bytes": version["size_bytes"]}
    return Done(facts, {"version": version["number"]})


def carry_out(task: Task, api: ServerApi, *, canary_share: float) -> Over:
    """What the gate decided. Raises RoundError, RefusedError, ServerDownError."""
    round = task.round
    decision, ref = decision_of(round), round.version_ref
    assert ref is not None
    why = f"{round.ref}: {'; '.join(decision.reasons)}"
    match decision.outcome:
        case Outcome.NOT_ENOUGH_EVIDENCE:
            return Over(Result.NOT_ENOUGH_EVIDENCE, "; ".join(decision.reasons))
        case Outcome.REJECT:
            reject(api, ref, why)
            return Over(Result.REJECTED, "; ".join(decision.reasons))
    opponent = decision.opponent if decision.has_live else None
    try:
        agree(lambda: _begin_canary(task, api, ref, opponent, canary_share, why))
    except CanaryHeldError as error:  # begun by somebody while the round was at work; what it proved is not thrown away
        return Over(Result.FAILED, str(error))
    return Over(Result.CANARY, "; ".join(decision.reasons))


def reject(api: ServerApi, ref: VersionRef, reason: str) -> None:
    """Unless somebody has, or it went another way already."""
    agree(lambda: _reject(api, ref, reason))


def abandon(api: ServerApi, round: Round, reason: str, *, keep: int | None = None) -> None:
    """Whatever the round brought in goes no further, but for the version `keep`."""
    if round.phase in (Phase.SNAPSHOT, Phase.TRAIN, Phase.EXPORT) and not round.num_restarts:
        return  # nothing can be there
    for one in api.adapter(round.ref.adapter)["versions"]:
        if one["origin"] == str(round.ref) and one["state"] == "candidate" and one["number"] != keep:
            reject(api, VersionRef(round.ref.adapter, one["number"]), reason)


def agree(act: Callable[[], None]) -> None:
    """Look and act, again when somebody else was faster. Raises RefusedError."""
    for left in reversed(range(MAX_TRIES)):
        try:
            return act()
        except RefusedError as error:
            if error.status != 409 or not left:
                raise


def _reject(api: ServerApi, ref: VersionRef, reason: str) -> None:
    adapter = api.adapter(ref.adapter)
    if _state(adapter, ref) in ("candidate", "shadow", "canary"):
        api.reject(ref, reason=reason, expected_change=adapter["change"])


def _begin_canary(task: Task, api: ServerApi, ref: VersionRef, opponent: str | None, share: float, reason: str) -> None:
    task.check()  # the last look for deletions
    adapter = api.adapter(ref.adapter)
    state = _state(adapter, ref)
    if state in ("canary", "live", "retired"):
        return
    if state == "rejected":
        raise RoundError(f"{ref} was rejected by somebody else while the gate was at work")
    if adapter["live"] != opponent:
        raise RoundError(
            f"the gate compared {ref} with {opponent or 'the base'}, but {adapter['live'] or 'the base'} answers now"
        )
    if adapter["canary"] is not None:
        raise CanaryHeldError(
            f"{adapter['canary']} is the canary already; {ref} passed the gate and stays a candidate: "
            f"sterna adapters canary {ref} begins it"
        )
    api.start_canary(ref, share=share, reason=reason, expected_change=adapter["change"])


def _state(adapter: dict[str, Any], ref: VersionRef) -> str:
    return next(str(one["state"]) for one in adapter["versions"] if one["version"] == str(ref))
