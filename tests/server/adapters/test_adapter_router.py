"""Routing: names, arms, draws that stick to an episode, shares that are kept, tables that are swapped whole."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.registry import Registry
from server.adapters.router import MAX_NAMES_SHOWN, AdapterRoutes, Arm, Route, RoutingTable, draw
from server.adapters.states import State
from server.adapters.version import VersionRef
from server.errors import ModelNotFoundError
from server.storage.database import Database
from tests.server.adapters.make import WHO, add, put_live, version

KEY = b"k" * 32
V1, V2, V3 = (version(number) for number in (1, 2, 3))
NUM_EPISODES = 4000


def table(**routes: Any) -> RoutingTable:
    one = AdapterRoutes("tools", versions=dict(enumerate((V1, V2, V3), 1)), **routes)
    return RoutingTable(frozenset({"base", "base-alias"}), KEY).with_routes([one])


def arms(of: RoutingTable, num_episodes: int = NUM_EPISODES) -> list[Route]:
    return [of.resolve("tools", f"episode-{index}", "r") for index in range(num_episodes)]


def share(routes: list[Route], arm: Arm) -> float:
    return sum(route.arm is arm for route in routes) / len(routes)


def near(expected: float) -> Any:
    """Five standard deviations of the count; the draws are fixed, so this cannot flicker."""
    return pytest.approx(expected, abs=5 * (expected * (1 - expected) / NUM_EPISODES) ** 0.5)


def test_base_live_and_pinned() -> None:
    of = table(live=V2)
    for name in ("base", "base-alias"):
        assert of.resolve(name, "e", "r") == Route(None, None, Arm.BASE)
    route = of.resolve("tools", "e", "r")
    assert (route.adapter, route.version, route.arm, route.digest) == ("tools", V2, Arm.LIVE, V2.digest)
    for one in (V1, V2, V3):
        assert of.resolve(str(one.ref), "e", "r") == Route("tools", one, Arm.PINNED)
    assert table().resolve("tools", "e", "r") == Route("tools", None, Arm.BASE)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "other",
            "tools@4",
            "tools@0",
            "tools@01",
            "tools@-1",
            "tools@",
            "tools@1@1",
            "@1",
            "tools@latest",
            "TOOLS",
        ),
        *(
            "tools@1.0",
            "tools@99999999999",
            "/etc/passwd",
            "../tools@1",
            "tools@1/../2",
            "tools@١",
            "base@1",
            "tools\n",
        ),
    ],
)
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist; this server has '"):
        table(live=V1).resolve(name, "e", "r")


def test_a_404_stays_short() -> None:
    of = RoutingTable(frozenset(), KEY)
    with pytest.raises(ModelNotFoundError, match="this server has none"):
        of.resolve("x" * 10_000, "e", "r")
    of = of.with_routes([AdapterRoutes(f"adapter-{index:03}") for index in range(100)])
    with pytest.raises(ModelNotFoundError, match=f"and {100 - MAX_NAMES_SHOWN} more") as caught:
        of.resolve("x" * 10_000, "e", "r")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("asked", [0.0, 0.01, 0.1, 0.5, 0.99, 1.0])
def test_the_canary_gets_its_share_of_episodes(asked: float) -> None:
    of = table(live=V1, canary=V2, canary_share=asked)
    routes = arms(of)
    assert share(routes, Arm.CANARY) == near(asked)
    assert all(route.version is (V2 if route.arm is Arm.CANARY else V1) for route in routes)
    assert share(arms(table(canary=V2, canary_share=asked)), Arm.BASE) == near(1 - asked)  # beside the base


def test_an_episode_stays_where_it_is() -> None:
    of = table(live=V1, canary=V2, canary_share=0.5)
    for index in range(50):
        routes = {of.resolve("tools", f"e{index}", f"request-{number}").arm for number in range(20)}
        assert len(routes) == 1
    assert {of.resolve("tools", None, f"request-{number}").arm for number in range(50)} == {Arm.LIVE, Arm.CANARY}


def test_a_larger_share_keeps_whom_it_had() -> None:
    small, large = (table(live=V1, canary=V2, canary_share=asked) for asked in (0.1, 0.3))
    had = [route.arm is Arm.CANARY for route in arms(small)]
    has = [route.arm is Arm.CANARY for route in arms(large)]
    assert all(later for before, later in zip(had, has, strict=True) if before)


def test_hold_back_and_canary_together() -> None:
    of = table(live=V2, previous=V1, hold_back_share=0.2, canary=V3, canary_share=0.5)
    routes = arms(of)
    assert share(routes, Arm.CANARY) == near(0.5)
    assert share(routes, Arm.HOLD_BACK) == near(0.1)  # a fifth of the other half: the draws are independent
    assert share(routes, Arm.LIVE) == near(0.4)
    expected = {Arm.CANARY: V3, Arm.HOLD_BACK: V1, Arm.LIVE: V2}
    assert all(route.version is expected[route.arm] for route in routes)
    first = arms(table(live=V1, previous=None, hold_back_share=0.2))  # after a first promotion: the base
    assert share(first, Arm.HOLD_BACK) == near(0.2)
    assert {route.version for route in first if route.arm is Arm.HOLD_BACK} == {None}


def test_the_draw_of_one_promotion_says_nothing_about_the_next() -> None:
    again = dataclasses.replace(V2, state_change=99)
    first, other, repeated = (
        [route.arm is Arm.CANARY for route in arms(table(live=V1, canary=canary, canary_share=0.5))]
        for canary in (V2, V3, again)
    )
    for left, right in ((first, other), (first, repeated), (other, repeated)):
        assert sum(a and b for a, b in zip(left, right, strict=True)) / NUM_EPISODES == near(0.25)


def test_shadow_is_drawn_apart_and_never_answers() -> None:
    of = table(live=V1, shadow=V3, shadow_share=0.25, canary=V2, canary_share=0.5)
    routes = arms(of)
    assert sum(route.shadow is V3 for route in routes) / NUM_EPISODES == near(0.25)
    assert sum(route.shadow is V3 and route.arm is Arm.CANARY for route in routes) / NUM_EPISODES == near(0.125)
    assert not [route for route in routes if route.version is V3]
    assert of.resolve("tools@1", "e", "r").shadow is None


def test_the_key_decides() -> None:
    other = dataclasses.replace(table(live=V1, canary=V2, canary_share=0.5), draw_key=b"x" * 32)
    mine, theirs = ([route.arm for route in arms(of)] for of in (table(live=V1, canary=V2, canary_share=0.5), other))
    assert sum(a is b for a, b in zip(mine, theirs, strict=True)) / NUM_EPISODES == near(0.5)


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="\0")))
def test_draws_are_numbers_below_one_for_any_text(unit: str, label: str) -> None:
    assert 0 <= draw(KEY, label, unit) < 1
    assert draw(KEY, label, unit) == draw(KEY, label, unit)
    assert draw(KEY, label, "\ud800" + unit) != draw(KEY, label, unit)


def test_a_new_table_leaves_the_old_one_alone() -> None:
    old = table(live=V1)
    new = old.with_routes([AdapterRoutes("tools", live=V2), AdapterRoutes("other", live=None)])
    assert old.resolve("tools", "e", "r").version is V1
    assert new.resolve("tools", "e", "r").version is V2
    assert set(old.adapters) == {"tools"}
    assert set(new.adapters) == {"tools", "other"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        new.draw_key = b""  # type: ignore[misc]
    with pytest.raises(TypeError):
        new.adapters["tools"] = old.adapters["tools"]  # type: ignore[index]


def test_from_the_registry(sqlite_database: Database) -> None:
    registry = Registry(sqlite_database)
    refs = [add(registry, content=str(number)) for number in range(1, 6)]
    put_live(registry, refs[0], hold_back_share=0.5)
    routes = AdapterRoutes.of(registry.adapter("tools"))
    assert [one.ref.number for one in routes.serving()] == [1]
    assert routes.previous is None
    put_live(registry, refs[1], hold_back_share=0.25)
    registry.start_canary(refs[2], share=0.5, **WHO)
    registry.start_shadow(refs[3], share=0.125, **WHO)
    registry.reject(refs[4], **WHO)
    registry.mark_deleted(refs[4], **WHO)
    routes = AdapterRoutes.of(registry.adapter("tools"))
    assert [one.ref.number for one in routes.serving()] == [2, 3, 1]
    assert (routes.hold_back_share, routes.canary_share, routes.shadow_share) == (0.25, 0.5, 0.125)
    assert routes.shadow is not None
    assert routes.shadow.ref.number == 4
    assert set(routes.versions) == {1, 2, 3, 4}
    assert routes.versions[1].state is State.RETIRED
    registry.rollback("tools", **WHO)
    registry.rollback("tools", **WHO)
    routes = AdapterRoutes.of(registry.adapter("tools"))
    assert (routes.live, routes.hold_back_share) == (None, 0.0)
    assert VersionRef.parse("tools@1") == refs[0]
