"""The states of an adapter version and every legal step between them, as one table.

`candidate -> (shadow) -> canary -> live -> retired`, or `rejected`. Going live without the canary's test is an
override, which a named human asks for. Not here: who decides (the gate, the sequential test, the watch), and storage.
"""

from enum import StrEnum

from server.adapters.errors import AdapterStateError


class State(StrEnum):
    """Where a version stands. A version that answers nobody by role is still served when it is asked for by number."""

    CANDIDATE = "candidate"
    SHADOW = "shadow"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"


class Action(StrEnum):
    """Why a row of the history was written. Those below the line change no state."""

    CREATE = "create"
    """Of an adapter without a version: the base answers for it."""
    IMPORT = "import"
    SHADOW = "shadow"
    CANARY = "canary"
    PROMOTE = "promote"
    OVERRIDE = "override"
    REJECT = "reject"
    SUPERSEDE = "supersede"
    ROLLBACK = "rollback"
    RESTORE = "restore"
    # ----
    SHARE = "share"
    PIN = "pin"
    UNPIN = "unpin"
    DELETE = "delete"


TRANSITIONS: dict[Action, tuple[frozenset[State], State]] = {
    Action.SHADOW: (frozenset({State.CANDIDATE}), State.SHADOW),
    Action.CANARY: (frozenset({State.CANDIDATE, State.SHADOW}), State.CANARY),
    Action.PROMOTE: (frozenset({State.CANARY}), State.LIVE),
    Action.OVERRIDE: (frozenset({State.CANDIDATE, State.SHADOW, State.CANARY}), State.LIVE),
    Action.REJECT: (frozenset({State.CANDIDATE, State.SHADOW, State.CANARY}), State.REJECTED),
    # Another version took its place, or it did badly: two ways out of live, one state.
    Action.SUPERSEDE: (frozenset({State.LIVE}), State.RETIRED),
    Action.ROLLBACK: (frozenset({State.LIVE}), State.RETIRED),
    # The other half of a rollback. Only what was live can be retired, so only that can come back.
    Action.RESTORE: (frozenset({State.RETIRED}), State.LIVE),
}
"""From which states an action leads where. Everything else is refused."""

EXCLUSIVE = (State.SHADOW, State.CANARY, State.LIVE)
"""At most one version of an adapter is in each of these; the database enforces it (tables.py)."""

DELETABLE = frozenset({State.RETIRED, State.REJECTED})


def target_state(version: object, state: State, action: Action) -> State:
    """Where `action` leads from `state`. Raises AdapterStateError."""
    sources, target = TRANSITIONS[action]
    if state not in sources:
        accepted = " or ".join(sorted(sources))
        raise AdapterStateError(f"{version} is {state}; '{action}' needs a version that is {accepted}")
    return target
