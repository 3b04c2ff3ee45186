"""From a model name to the version that answers: pure logic over an immutable table that is swapped whole.

Draws are keyed hashes of the episode, so that an episode stays with its version on every server of one registry, a
client cannot choose its side, and the draw of one promotion says nothing about the next.

Not here: whether the version is loaded (residency.py), and how the table comes to be (service.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from types import MappingProxyType

from server.adapters.states import State
from server.adapters.version import Adapter, Version, VersionRef
from server.errors import ModelNotFoundError

MAX_NAMES_SHOWN = 20
"""Names listed in a 404: enough to find a typo, few enough for one line."""


class Arm(StrEnum):
    """Why this version answers."""

    LIVE = "live"
    CANARY = "canary"
    HOLD_BACK = "hold_back"
    PINNED = "pinned"
    BASE = "base"


@dataclass(frozen=True, slots=True)
class Route:
    """Who answers one request. `version` None is the base model."""

    adapter: str | None
    version: Version | None
    arm: Arm
    shadow: Version | None = None
    """Also run on this one, off the critical path; its answer is never returned."""

    @property
    def digest(self) -> str | None:
        return None if self.version is None else self.version.digest


@dataclass(frozen=True, slots=True)
class AdapterRoutes:
    """One adapter's part of the table: what answers by role, and what may be asked for by number."""

    name: str
    live: Version | None = None
    canary: Version | None = None
    canary_share: float = 0.0
    hold_back_share: float = 0.0
    """The share of episodes that stays on `previous` (None: the base)."""
    previous: Version | None = None
    shadow: Version | None = None
    shadow_share: float = 0.0
    versions: Mapping[int, Version] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter) -> "AdapterRoutes":
        """What the registry says."""
        is_live = adapter.live is not None
        return cls(
            adapter.name,
            live=adapter.live,
            canary=adapter.in_state(State.CANARY),
            canary_share=adapter.canary_share,
            hold_back_share=adapter.hold_back_share if is_live else 0.0,
            previous=adapter.previous,
            shadow=adapter.in_state(State.SHADOW),
            shadow_share=adapter.shadow_share,
            versions=MappingProxyType({n: one for n, one in adapter.versions.items() if not one.is_deleted}),
        )

    def serving(self) -> list[Version]:
        """The versions that answer somebody by role, the live one first."""
        held_back = self.previous if self.hold_back_share > 0 else None
        canary = self.canary if self.canary_share > 0 else None
        return [one for one in (self.live, canary, held_back) if one is not None]

    def resolve(self, draw_key: bytes, unit: str) -> Route:
        """Draw the arm of an episode."""
        shadow = self._drawn(draw_key, "shadow", self.shadow, self.shadow_share, unit)
        canary = self._drawn(draw_key, "canary", self.canary, self.canary_share, unit)
        if canary is not None:
            return Route(self.name, canary, Arm.CANARY, shadow)
        if self._drawn(draw_key, "hold_back", self.live, self.hold_back_share, unit) is not None:
            return Route(self.name, self.previous, Arm.HOLD_BACK, shadow)
        return Route(self.name, self.live, Arm.BASE if self.live is None else Arm.LIVE, shadow)

    @staticmethod
    def _drawn(draw_key: bytes, kind: str, version: Version | None, share: float, unit: str) -> Version | None:
        if version is None or share <= 0:
            return None
        label = f"{kind} {version.ref} {version.state_change}"
        return version if draw(draw_key, label, unit) < share else None


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """All that `resolve` needs. Never changed: a new one takes its place."""

    base_names: frozenset[str]
    draw_key: bytes
    adapters: Mapping[str, AdapterRoutes] = field(default_factory=dict)

    def resolve(self, model_name: str, episode_id: str | None, request_id: str) -> Route:
        """A request without an episode is one of its own. Raises ModelNotFoundError."""
        if model_name in self.base_names:
            return Route(None, None, Arm.BASE)
        routes = self.adapters.get(model_name)
        if routes is not None:
            return routes.resolve(self.draw_key, request_id if episode_id is None else episode_id)
        ref = VersionRef.parse(model_name)
        routes = self.adapters.get(ref.adapter) if ref else None
        if ref is None or routes is None:
            raise self._unknown(model_name, [*sorted(self.base_names), *sorted(self.adapters)])
        if ref.number not in routes.versions:
            numbers = sorted(routes.versions, reverse=True)
            raise self._unknown(model_name, [str(VersionRef(ref.adapter, number)) for number in numbers])
        return Route(ref.adapter, routes.versions[ref.number], Arm.PINNED)

    def with_routes(self, changed: Iterable[AdapterRoutes]) -> "RoutingTable":
        """The table with some adapters' parts replaced."""
        adapters = {**self.adapters, **{routes.name: routes for routes in changed}}
        return RoutingTable(self.base_names, self.draw_key, MappingProxyType(adapters))

    @staticmethod
    def _unknown(model_name: str, known: list[str]) -> ModelNotFoundError:
        shown = ", ".join(f"'{name}'" for name in known[:MAX_NAMES_SHOWN])
        more = f" and {len(known) - MAX_NAMES_SHOWN} more" if len(known) > MAX_NAMES_SHOWN else ""
        return ModelNotFoundError(
            f"The model '{model_name[:200]}' does not exist; this server has {shown or 'none'}{more}."
        )


def draw(key: bytes, label: str, unit: str) -> float:
    """A number in [0, 1) that only the holder of `key` can foresee: equal for equal (label, unit)."""
    # A surrogate cannot be encoded strictly, and ids come from clients. NUL parts the fields: labels hold none.
    data = f"{label}\0{unit}".encode(errors="surrogatepass")
    return (int.from_bytes(blake2b(data, digest_size=8, key=key).digest(), "little") >> 11) / 2**53
