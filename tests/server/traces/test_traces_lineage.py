"""Who saw a trace, before and after it was deleted."""

import pytest

from server.storage.database import Database
from server.traces.deletion import TraceDeletion
from server.traces.errors import TraceNotFoundError
from server.traces.filters import TraceFilter
from server.traces.lineage import Lineage, Sighting
from server.traces.queries import TraceQueries
from server.traces.viewer import ADMIN
from tests.server.traces.builders import Client, assistant, user


def seq_of(database: Database, trace_id: str) -> int:
    return TraceQueries(database).show(ADMIN, trace_id).summary.seq


def test_a_trace_knows_its_snapshots_and_their_versions_also_after_it_is_gone(
    database: Database, client: Client
) -> None:
    one, other = (client.ask([user(text)], assistant("yes")) for text in ("first?", "second?"))
    lineage = Lineage(database)
    seqs = seq_of(database, one.id), seq_of(database, other.id)
    lineage.add_snapshot("sha256:a", "tools", {"train": [seqs[0]], "held_out": [seqs[1]]})
    lineage.add_snapshot("sha256:a", "tools", {"train": [seqs[1]]})  # known: nothing changes
    lineage.add_snapshot("sha256:b", "tools", {"replay": [seqs[0]], "train": [seqs[0]], "held_out": []})
    lineage.add_version("tools", 1, "sha256:a")
    lineage.add_version("tools", 1, "sha256:a")
    lineage.add_version("tools", 2, "sha256:b", parent=1)
    lineage.add_version("tools", 3, "sha256:b")

    seen = [
        Sighting("sha256:a", "train", ("tools@1", "tools@2")),
        Sighting("sha256:b", "train", ("tools@2", "tools@3")),
    ]
    assert lineage.sightings(one.id) == seen
    assert lineage.sightings(other.id) == [Sighting("sha256:a", "held_out", ("tools@1", "tools@2"))]
    assert lineage.deleted_from("sha256:a") == []
    assert lineage.versions_that_saw([other.id]) == ["tools@1", "tools@2"]

    TraceDeletion(database).delete(ADMIN, TraceFilter(trace_id=one.id))
    assert lineage.sightings(one.id) == seen
    assert lineage.versions_that_saw([one.id, other.id, "trace-unknown"]) == ["tools@1", "tools@2", "tools@3"]
    assert lineage.versions_that_saw([]) == lineage.versions_that_saw(["trace-unknown"]) == []
    assert lineage.deleted_from("sha256:a") == [one.id]
    assert lineage.deleted_from("sha256:a", reasons=("size",)) == []
    with pytest.raises(TraceNotFoundError, match="trace-unknown"):
        lineage.sightings("trace-unknown")
