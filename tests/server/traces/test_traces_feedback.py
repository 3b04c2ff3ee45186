"""Feedback finds its trace, response or episode; twice is once; what is not one's own does not exist."""

import asyncio
from typing import Any

import pytest

from server.errors import InvalidRequestError
from server.storage.database import Database
from server.traces.deletion import TraceDeletion
from server.traces.errors import FeedbackConflictError, TraceNotFoundError
from server.traces.exchange import export_lines
from server.traces.feedback import Feedback, FeedbackStore, Target
from server.traces.filters import TraceFilter
from server.traces.queries import TraceQueries
from server.traces.viewer import ADMIN, Viewer
from tests.server.traces.builders import START, Client, assistant, call, user

A, B = Viewer("key-a"), Viewer("key-b")


@pytest.fixture
def feedback(database: Database) -> FeedbackStore:
    return FeedbackStore(database, clock=lambda: START)


def thumbs(score: float = 1.0, **changes: Any) -> Feedback:
    return Feedback(**({"source": "thumbs", "score": score} | changes))


def test_by_trace_by_response_and_for_the_episode(client: Client, feedback: FeedbackStore) -> None:
    first = client.ask([user("x")], assistant("y"), key_id="key-a")
    second = client.ask([user("x"), assistant("y"), user("z")], assistant("w"), key_id="key-a")
    correction = assistant("Z", call("search"))
    by_trace = feedback.add(A, Target("trace", second.id), thumbs(0.0, correction=correction, comment="nul \0"))
    assert second.response_id is not None
    by_response = feedback.add(A, Target("response", second.response_id), thumbs(0.5, source="known_answer", label="l"))
    by_episode = feedback.add(ADMIN, Target("episode", first.episode.id), thumbs(1.0, source="audit_sample"))
    assert (by_trace.trace_id, by_response.trace_id, by_episode.trace_id) == (second.id, second.id, None)
    assert by_episode.episode_id == first.episode.id
    assert all(one.is_new for one in (by_trace, by_response, by_episode))
    listed = feedback.list_for_trace(ADMIN, second.id)
    assert [one.id for one in listed] == [by_trace.id, by_response.id, by_episode.id]
    assert listed[0].feedback.correction == correction
    assert listed[0].feedback.comment == "nul \ufffd"
    assert (listed[1].feedback.score, listed[1].feedback.source) == (0.5, "known_answer")
    assert (listed[0].key_id, listed[2].key_id, listed[0].created_at) == ("key-a", "", START)
    assert [one.id for one in feedback.list_for_trace(ADMIN, first.id)] == [by_episode.id]
    assert [one.id for one in feedback.list_for_trace(A, second.id)] == [by_trace.id, by_response.id]
    found = TraceQueries(client.store.database).list(A, TraceFilter(has_feedback=True)).traces
    assert {one.id for one in found} == {first.id, second.id}


def test_twice_is_once(client: Client, feedback: FeedbackStore) -> None:
    target = Target("trace", client.ask([user("x")], assistant("y"), key_id="key-a").id)
    for given in (thumbs(), thumbs(0.5, idempotency_key="k1")):
        first = feedback.add(A, target, given)
        again = feedback.add(A, target, given)
        assert (first.is_new, again.is_new) == (True, False)
        assert first.id == again.id
    with pytest.raises(FeedbackConflictError):
        feedback.add(A, target, thumbs(0.6, idempotency_key="k1"))
    assert feedback.add(ADMIN, target, thumbs(0.6, idempotency_key="k1")).is_new, "another key's keys are its own"
    assert feedback.add(A, target, thumbs(0.6)).is_new, "a change of mind is new feedback"
    assert len(feedback.list_for_trace(ADMIN, target.id)) == 4


@pytest.mark.parametrize("kind", ["trace", "response", "episode"])
def test_unknown_anothers_and_deleted_look_alike(client: Client, feedback: FeedbackStore, kind: Any) -> None:
    record = client.ask([user("x")], assistant("y"), key_id="key-a")
    name = {"trace": record.id, "response": str(record.response_id), "episode": record.episode.id}[kind]
    with pytest.raises(TraceNotFoundError, match=f"no {kind}"):
        feedback.add(A, Target(kind, "nonsense"), thumbs())
    with pytest.raises(TraceNotFoundError, match=f"no {kind}"):
        feedback.add(B, Target(kind, name), thumbs())
    if kind == "trace":
        with pytest.raises(TraceNotFoundError):
            feedback.list_for_trace(B, name)
    feedback.add(A, Target(kind, name), thumbs())
    TraceDeletion(client.store.database).delete(A, TraceFilter(key_id="key-a"))
    with pytest.raises(TraceNotFoundError, match=f"no {kind}"):
        feedback.add(A, Target(kind, name), thumbs())


def test_an_episode_merged_into_another_is_found_by_its_old_id(client: Client, feedback: FeedbackStore) -> None:
    calls = [call("s"), call("s")]
    ones = [client.ask([user(f"{n}")], assistant(None, calls[n])) for n in (0, 1)]
    given = feedback.add(Viewer(), Target("episode", ones[1].episode.id), thumbs(0.25))
    results = [{"role": "tool", "tool_call_id": asked["id"], "content": "x"} for asked in calls]
    client.ask([user("2"), *results], assistant("z"))
    after = feedback.add(Viewer(), Target("episode", ones[1].episode.id), thumbs(0.75))
    assert after.episode_id == ones[0].episode.id
    assert [one.id for one in feedback.list_for_trace(Viewer(), ones[0].id)] == [given.id, after.id]


def test_a_batch_is_all_or_none(client: Client, feedback: FeedbackStore) -> None:
    record = client.ask([user("x")], assistant("y"))
    good = (Target("trace", record.id), thumbs())
    with pytest.raises(TraceNotFoundError):
        feedback.add_many(Viewer(), [good, (Target("trace", "nonsense"), thumbs())])
    with pytest.raises(InvalidRequestError) as caught:
        feedback.add_many(Viewer(), [good, (Target("trace", record.id), thumbs(2.0))])
    assert caught.value.param == "items[1].score"
    assert feedback.list_for_trace(Viewer(), record.id) == []
    assert [one.is_new for one in feedback.add_many(Viewer(), [good, good])] == [True, False]
    with pytest.raises(InvalidRequestError, match="at most 1000"):
        feedback.add_many(Viewer(), [good] * 1001)


def test_an_error_names_the_item(client: Client, feedback: FeedbackStore) -> None:
    target = Target("trace", client.ask([user("x")], assistant("y")).id)
    with pytest.raises(TraceNotFoundError) as unknown:
        feedback.add_many(Viewer(), [(target, thumbs()), (Target("episode", "nonsense"), thumbs())])
    used = thumbs(idempotency_key="k")
    with pytest.raises(FeedbackConflictError) as conflict:
        feedback.add_many(Viewer(), [(target, used), (target, thumbs()), (target, thumbs(0.0, idempotency_key="k"))])
    assert (unknown.value.param, conflict.value.param) == ("items[1]", "items[2]")
    with pytest.raises(TraceNotFoundError) as alone:
        feedback.add(Viewer(), Target("trace", "nonsense"), thumbs())
    assert alone.value.param is None


def test_new_feedback_says_which_versions_answered_users(client: Client, feedback: FeedbackStore) -> None:
    def ask(**changes: Any) -> Target:
        return Target("trace", client.ask([user("x")], assistant("y"), episode="run", **changes).id)

    base, first, second = ask(), ask(version="tools@1"), ask(version="tools@2")
    gate, imported = ask(purpose="evaluation", version="tools@3"), ask(endpoint="import")
    answered = [feedback.add(ADMIN, one, thumbs()).answered_by for one in (base, first, gate, imported)]
    assert answered == [(None,), ("tools@1",), (), ()]
    assert feedback.add(ADMIN, base, thumbs()).answered_by == (), "it is counted already"
    assert second.id
    assert set(feedback.add(Viewer(), Target("episode", "run"), thumbs()).answered_by) == {None, "tools@1", "tools@2"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (thumbs(1.01), "score"),
        (thumbs(-0.01), "score"),
        (thumbs(float("nan")), "score"),
        (Feedback(source="thumbs"), "score"),
        (thumbs(source="hearsay"), "source"),
        (thumbs(label=""), "label"),
        (thumbs(label="x" * 257), "label"),
        (thumbs(comment="x" * 16_385), "comment"),
        (thumbs(idempotency_key=""), "idempotency_key"),
        (thumbs(correction={"role": "user", "content": "x"}), "correction.role"),
        (thumbs(correction={"role": "assistant"}), "correction"),
        (thumbs(correction={"role": "assistant", "content": "x", "tool_calls": "y"}), "correction.tool_calls"),
    ],
)
def test_bad_feedback_names_the_field(client: Client, feedback: FeedbackStore, given: Feedback, param: str) -> None:
    record = client.ask([user("x")], assistant("y"))
    with pytest.raises(InvalidRequestError) as caught:
        feedback.add(Viewer(), Target("trace", record.id), given)
    assert caught.value.param == param


def test_a_correction_is_for_one_trace(client: Client, feedback: FeedbackStore) -> None:
    record = client.ask([user("x")], assistant("y"))
    with pytest.raises(InvalidRequestError, match="one trace"):
        feedback.add(Viewer(), Target("episode", record.episode.id), thumbs(correction=assistant("z")))


def test_feedback_is_redacted(client: Client, feedback: FeedbackStore) -> None:
    record = client.ask([user("x")], assistant("y"))
    secret = "ghp_" + "a" * 36
    feedback.add(Viewer(), Target("trace", record.id), thumbs(comment=secret, correction=assistant(secret)))
    stored = feedback.list_for_trace(Viewer(), record.id)[0].feedback
    assert secret not in str(stored)


def test_given_by_two_at_once_it_is_one_row(client: Client, feedback: FeedbackStore) -> None:
    record = client.ask([user("x")], assistant("y"))
    target = Target("trace", record.id)

    async def both() -> set[str]:
        tasks = [asyncio.to_thread(feedback.add, Viewer(), target, thumbs()) for _ in range(4)]
        return {one.id for one in await asyncio.gather(*tasks)}

    assert len(asyncio.run(both())) == 1


def test_however_it_is_addressed_it_is_the_same_target(client: Client, feedback: FeedbackStore) -> None:
    record = client.ask([user("x")], assistant("y"), key_id="key-a", episode="run")
    other = client.ask([user("z")], assistant("y"), key_id="key-a")
    names = [[Target("trace", record.id), Target("response", str(record.response_id))],
             [Target("episode", record.episode.id), Target("episode", "run")]]  # fmt: skip
    for number, targets in enumerate(names):
        for given in (thumbs(), thumbs(0.5, idempotency_key=f"k{number}")):
            stored = [feedback.add(A, target, given) for target in targets]
            assert [one.is_new for one in stored] == [True, False]
            assert len({one.id for one in stored}) == 1
    for elsewhere in (Target("trace", other.id), Target("episode", "run")):
        with pytest.raises(FeedbackConflictError):
            feedback.add(A, elsewhere, thumbs(0.5, idempotency_key="k0"))
    assert len(feedback.list_for_trace(A, record.id)) == 4


def test_a_key_sees_the_feedback_that_it_gave_and_admin_all(client: Client, feedback: FeedbackStore) -> None:
    record = client.ask([user("x")], assistant("y"), key_id="key-a")
    target, database = Target("trace", record.id), client.store.database
    feedback.add(A, target, thumbs(1.0, correction=assistant("mine")))
    feedback.add(ADMIN, target, thumbs(0.0, label="audit", correction=assistant("secret")))
    queries = TraceQueries(database)
    assert [one.feedback.label for one in queries.show(A, record.id).feedback] == [None]
    assert [one.feedback.label for one in queries.show(ADMIN, record.id).feedback] == [None, "audit"]
    for viewer, correction, number, mean in ((A, "mine", 1, 1.0), (ADMIN, "secret", 2, 0.5)):
        [line] = export_lines(database, viewer, TraceFilter(), with_corrections=True)
        assert correction in line
        totals = queries.stats(viewer, TraceFilter())
        assert (totals["num_feedback"], totals["mean_score"]) == (number, mean)


def test_what_joins_a_judged_episode_has_feedback_too(client: Client, feedback: FeedbackStore) -> None:
    def judged() -> set[str]:
        found = TraceQueries(client.store.database).list(ADMIN, TraceFilter(has_feedback=True)).traces
        return {one.id for one in found}

    calls = [call("s"), call("s")]
    ones = [client.ask([user(f"{n}")], assistant(None, calls[n])) for n in (0, 1)]
    feedback.add(Viewer(), Target("episode", ones[1].episode.id), thumbs())
    assert judged() == {ones[1].id}
    results = [{"role": "tool", "tool_call_id": asked["id"], "content": "x"} for asked in calls]
    later = client.ask([user("1"), assistant(None, calls[1]), results[1]], assistant("later"))
    assert judged() == {ones[1].id, later.id}
    merging = client.ask([user("2"), *results], assistant("z"))
    assert client.episode_of(ones[0]) == client.episode_of(merging)
    assert judged() == {one.id for one in (*ones, later, merging)}
    alone = client.ask([user("3")], assistant("z"))
    assert alone.id not in judged()
