"""The registry's words as JSON objects: what /v1/adapters answers. Times are ISO 8601 in UTC, sizes are bytes."""

import json
import time
from collections.abc import Mapping
from typing import Any

from server.adapters.compare import ProjectionDiff
from server.adapters.follower import Failure
from server.adapters.router import AdapterRoutes
from server.adapters.service import AdapterService
from server.adapters.states import State
from server.adapters.version import Adapter, Change, Version
from server.openai.protocol.chunks import Body


def list_body(rows: list[Body]) -> Body:
    return {"object": "list", "data": rows}


def summary_body(adapter: Adapter) -> Body:
    """One adapter as the registry has it; versions by reference."""
    return {
        "object": "adapter",
        "name": adapter.name,
        "change": adapter.change,
        "live": _ref(adapter.live),
        "previous": _ref(adapter.previous),
        "canary": _ref(adapter.in_state(State.CANARY)),
        "shadow": _ref(adapter.in_state(State.SHADOW)),
        "canary_share": adapter.canary_share,
        "shadow_share": adapter.shadow_share,
        "hold_back_share": adapter.hold_back_share,
        "num_versions": sum(not version.is_deleted for version in adapter.versions.values()),
    }


def adapter_body(adapter: Adapter, service: AdapterService[Any]) -> Body:
    """With every version, the newest first, and what this server makes of it."""
    versions = sorted(adapter.versions.values(), key=lambda version: version.ref.number, reverse=True)
    return summary_body(adapter) | {
        "versions": [version_body(version) for version in versions],
        "serving": _serving(adapter, service),
    }


def version_body(version: Version) -> Body:
    """Without the directory, which is nobody's business outside."""
    predecessor = version.predecessor
    return {
        "object": "adapter.version",
        "version": str(version.ref),
        "adapter": version.ref.adapter,
        "number": version.ref.number,
        "state": version.state.value,
        "digest": version.digest,
        "base_digest": version.base_digest,
        "rank": version.rank,
        "size_bytes": version.size_bytes,
        "memory_bytes": version.memory_bytes,
        "origin": version.origin,
        "parent": version.parent,
        "created_at": version.created_at.isoformat(),
        "predecessor": None if predecessor is None else f"{version.ref.adapter}@{predecessor}",
        "is_pinned": version.is_pinned,
        "is_deleted": version.is_deleted,
    }


def change_body(change: Change) -> Body:
    return {
        "object": "adapter.change",
        "number": change.number,
        "adapter": change.adapter,
        "version": None if change.ref is None else str(change.ref),
        "action": change.action.value,
        "from_state": None if change.from_state is None else change.from_state.value,
        "to_state": None if change.to_state is None else change.to_state.value,
        "share": change.share,
        "reason": change.reason,
        "asked_by": change.asked_by,
        "at": change.at.isoformat(),
    }


def diff_body(
    left: Version, right: Version, config: Mapping[str, tuple[Any, Any]], projections: list[ProjectionDiff]
) -> Body:
    return {
        "object": "adapter.diff",
        "left": version_body(left),
        "right": version_body(right),
        "config": {key: {"left": _plain(values[0]), "right": _plain(values[1])} for key, values in config.items()},
        "projections": [
            {
                "layer": row.layer,
                "projection": row.projection,
                "left_norm": row.left_norm,
                "right_norm": row.right_norm,
                "difference_norm": row.difference_norm,
            }
            for row in projections
        ],
    }


def _serving(adapter: Adapter, service: AdapterService[Any]) -> Body:
    """This server's routes, which lag behind the registry while a version is loaded or cannot be."""
    stats = service.stats()
    routes = next((one for one in service.adapters() if one.name == adapter.name), AdapterRoutes(adapter.name))
    failure = next((one for one in stats.failures if one.version.adapter == adapter.name), None)
    names = {str(version.ref) for version in adapter.versions.values()}
    return {
        "live": _ref(routes.live),
        "canary": _ref(routes.canary),
        "shadow": _ref(routes.shadow),
        "previous": _ref(routes.previous),
        "canary_share": routes.canary_share,
        "shadow_share": routes.shadow_share,
        "hold_back_share": routes.hold_back_share,
        "num_requests": {name: count for name, count in stats.num_requests.items() if name in names},
        "failure": None if failure is None else _failure(failure),
    }


def _failure(failure: Failure) -> Body:
    return {
        "version": str(failure.version),
        "reason": failure.reason,
        "num_attempts": failure.num_attempts,
        "retry_in_seconds": round(max(failure.retry_at - time.monotonic(), 0.0), 3),
    }


def _plain(value: Any) -> Any:
    """A configuration may hold NaN where it means nothing to us; JSON on the wire may not."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return str(value)
    return value


def _ref(version: Version | None) -> str | None:
    return None if version is None else str(version.ref)
