"""Which requests make one episode, and which side it is on."""

import asyncio

import pytest
from sqlalchemy import select

from server.storage.database import open_database
from server.traces.digests import Anchor, read_conversation
from server.traces.episodes import Episodes, Known, choose
from server.traces.sides import SideDraw
from server.traces.store import TraceStore
from server.traces.tables import episodes
from tests.server.traces.builders import Client, assistant, call, make_record, result, system, tool, user

LONG = "The capital of France is Paris, which lies on the river Seine and has two million people."


@pytest.fixture(params=["remembered", "restarted"])
def is_restarted(request: pytest.FixtureRequest) -> bool:
    """Every rule holds for what the process remembers and for what only the database knows."""
    return bool(request.param == "restarted")


def test_a_request_with_our_answer_in_it_joins(client: Client, is_restarted: bool) -> None:
    first = client.ask([user("hi")], assistant("yes?"))
    if is_restarted:
        client.forget()
    second = client.ask([user("hi"), assistant("yes?"), user("a joke")], assistant("no"))
    if is_restarted:
        client.forget()
    third = client.ask(
        [system("now it is 5"), user("hi"), assistant(" yes?\n"), user("a joke"), assistant("no"), user("please")],
        assistant("ok"),
    )
    assert client.episode_of(first) == client.episode_of(second) == client.episode_of(third)
    assert second.episode.id == first.episode.id, "the id a client was told stays the episode's"


def test_a_shared_system_prompt_or_first_message_alone_never_joins(client: Client, is_restarted: bool) -> None:
    first = client.ask([system("you are an agent"), user("start")], assistant("one"))
    if is_restarted:
        client.forget()
    second = client.ask([system("you are an agent"), user("start")], assistant("two"))
    assert client.episode_of(first) != client.episode_of(second)


def test_two_agents_with_one_beginning_stay_apart(client: Client, is_restarted: bool) -> None:
    """Greedy decoding answers both alike; then each goes its way."""
    begin = [user("start")]
    one, two = client.ask(begin, assistant("ready")), client.ask(begin, assistant("ready"))
    seen = []
    for text in ("red", "blue"):
        if is_restarted:
            client.forget()
        history = [*begin, assistant("ready"), user(text)]
        second = client.ask(history, assistant(f"{text}!"))
        if is_restarted:
            client.forget()
        third = client.ask([*history, assistant(f"{text}!"), user("go on")], assistant("done"))
        assert client.episode_of(second) == client.episode_of(third)
        seen.append(client.episode_of(third))
    assert set(seen) == {client.episode_of(one), client.episode_of(two)}


NUM_AGENTS = 20


def test_many_agents_with_one_first_turn_stay_apart(client: Client, is_restarted: bool) -> None:
    """A call's id says whose it is, however many others were answered alike."""
    begin = [user("start")]
    firsts = [client.ask(begin, assistant(None, call("look"))) for _ in range(NUM_AGENTS)]
    if is_restarted:
        client.forget()
    for number, first in enumerate(firsts):
        said = dict(first.answers[0].message)
        history = [*begin, said, result(said["tool_calls"][0]["id"], "nothing")]
        second = client.ask(history, assistant("next?"))
        third = client.ask([*history, assistant("next?"), user(f"{number}")], assistant("done"))
        assert second.episode.id == third.episode.id == first.episode.id
        assert (second.episode.others, third.episode.others) == ((), ())
    assert len(set(client.rows().values())) == NUM_AGENTS


def test_many_users_with_one_greeting_stay_apart(client: Client, is_restarted: bool) -> None:
    begin = [user("Hi")]
    for _ in range(NUM_AGENTS):
        client.ask(begin, assistant("Hello!"))
    if is_restarted:
        client.forget()
    history = [*begin, assistant("Hello!"), user("How are you?")]
    seconds = [client.ask(history, assistant("Fine.")) for _ in range(NUM_AGENTS)]
    if is_restarted:
        client.forget()
    thirds = [
        client.ask([*history, assistant("Fine."), user(f"{number}")], assistant("ok")) for number in range(NUM_AGENTS)
    ]
    for turn in (seconds, thirds):
        assert len({record.episode.id for record in turn}) == NUM_AGENTS
    assert len({episode for episode, _ in client.rows().values()}) == NUM_AGENTS, "and nothing was merged"


def test_requests_that_come_together_take_different_episodes(client: Client) -> None:
    for _ in range(2):
        client.ask([user("Hi")], assistant("Hello!"))
    client.forget()
    shown = read_conversation("", [user("Hi"), assistant("Hello!"), user("and now?")], None)

    async def both() -> list[str]:
        return [ref.id for ref in await asyncio.gather(*(client.episodes.resolve("", shown) for _ in range(2)))]

    assert len(set(asyncio.run(both())) & {episode for episode, _ in client.rows().values()}) == 2


def test_a_call_is_found_behind_a_thousand_equal_turns(client: Client) -> None:
    begin = [user("start")]
    records = [make_record(begin, assistant(None, call("look"))) for _ in range(1100)]
    client.store.write(records)
    for record in records[::100]:
        client.forget()
        said = dict(record.answers[0].message)
        again = client.ask([*begin, said, result(said["tool_calls"][0]["id"], "x")], assistant("y"))
        assert (again.episode.id, again.episode.others) == (record.episode.id, ())


def test_who_cannot_be_told_apart_begins_an_episode(client: Client, is_restarted: bool) -> None:
    """Two agents with one past went on; whose second try this is, nobody knows. The second try of one agent is its."""
    for agents in (["a"], ["b", "c"]):
        begin = [user(f"start {agents}")]
        history = [*begin, assistant("ready"), user("go")]
        ours = {client.ask(begin, assistant("ready")).episode.id for _ in agents}
        assert {client.ask(history, assistant(agent)).episode.id for agent in agents} == ours
        if is_restarted:
            client.forget()
        assert (client.ask(history, assistant("again")).episode.id in ours) == (len(agents) == 1)
    turn = Anchor(b"t", "turn")
    assert choose([turn], Known({b"t": {"ep-1": True}}, is_complete=False)) == ([], b"t"), "there may be others"


def test_a_tool_result_joins_the_call_that_caused_it(client: Client, is_restarted: bool) -> None:
    """Also when the client rewrote everything else."""
    asked = call("search", '{"q": "terns"}')
    first = client.ask([user("find terns")], assistant(None, asked))
    if is_restarted:
        client.forget()
    second = client.ask([user("(history cut)"), result(asked["id"], "found 3")], assistant("three"))
    assert client.episode_of(first) == client.episode_of(second)


def test_calls_are_recognized_by_what_they_say_too(client: Client) -> None:
    first = client.ask([user("find")], assistant("", call("search", '{"b": 1, "a": "x"}')))
    renamed = assistant(None, call("search", '{"a":"x","b":1}', call_id="toolu_1"))
    second = client.ask([user("find"), renamed, result("toolu_1", "ok")], assistant("there"))
    assert client.episode_of(first) == client.episode_of(second)


def test_a_long_answer_is_recognized_in_a_trimmed_history(client: Client, is_restarted: bool) -> None:
    first = client.ask([user("a"), assistant("b"), user("capital of France?")], assistant(LONG))
    short = client.ask([user("c"), assistant("d"), user("sure?")], assistant("Yes."))
    if is_restarted:
        client.forget()
    trimmed = client.ask([assistant(LONG), user("and of Italy?")], assistant("Rome"))
    unknown = client.ask([assistant("Yes."), user("why?")], assistant("because"))
    assert client.episode_of(first) == client.episode_of(trimmed)
    assert client.episode_of(short) != client.episode_of(unknown), "a short phrase tells nothing out of its context"


def test_a_long_phrase_said_in_two_episodes_tells_nothing(client: Client, is_restarted: bool) -> None:
    for text in ("one", "two"):
        client.ask([user(text)], assistant(LONG))
    if is_restarted:
        client.forget()
    third = client.ask([assistant(LONG), user("and now?")], assistant("no idea"))
    assert sum(episode == client.episode_of(third) for episode, _ in client.rows().values()) == 1


def test_keys_never_meet(client: Client, is_restarted: bool) -> None:
    asked = call("search")
    first = client.ask([user("x")], assistant(LONG, asked), key_id="key-a")
    if is_restarted:
        client.forget()
    history = [user("x"), assistant(LONG, asked), result(asked["id"], "error: no")]
    second = client.ask(history, assistant("y"), key_id="key-b")
    assert client.episode_of(first) != client.episode_of(second)
    named = [client.ask([user("x")], assistant("y"), key_id=key, episode="run 1") for key in ("key-a", "key-b")]
    assert client.episode_of(named[0]) != client.episode_of(named[1])
    forged = client.ask([user("x")], assistant("y"), key_id="key-b", episode=client.episode_of(first))
    assert client.episode_of(forged) != client.episode_of(first)


def test_an_explicit_episode_comes_first(client: Client) -> None:
    first = client.ask([user("a")], assistant("b"), episode="run 1")
    second = client.ask([user("c")], assistant("d"), episode="run 1")
    third = client.ask([user("a"), assistant("b"), user("e")], assistant("f"), episode="run 2")
    assert client.episode_of(first) == client.episode_of(second) != client.episode_of(third)
    client.forget()
    by_id = client.ask([user("g")], assistant("h"), episode=client.episode_of(first))
    assert client.episode_of(by_id) == client.episode_of(first)
    without = client.ask([user("c"), assistant("d"), user("i")], assistant("j"))
    assert client.episode_of(without) == client.episode_of(first)


def test_evaluation_neither_joins_nor_is_joined(client: Client, is_restarted: bool) -> None:
    asked = call("search")
    first = client.ask([user("a")], assistant(LONG, asked))
    history = [user("a"), assistant(LONG, asked), result(asked["id"], "Error: no")]
    gate = client.ask(history, assistant("a gate's answer"), purpose="evaluation")
    if is_restarted:
        client.forget()
    later = client.ask([*history, assistant("a gate's answer"), user("b")], assistant("c"))
    assert client.episode_of(first) == client.episode_of(later) != client.episode_of(gate)


def test_a_request_that_shows_two_episodes_merges_them(client: Client, is_restarted: bool) -> None:
    calls = [call("search"), call("search")]
    ones = [client.ask([user(f"task {n}")], assistant(None, calls[n])) for n in (0, 1)]
    if is_restarted:
        client.forget()
    both = [result(calls[0]["id"], "x"), result(calls[1]["id"], "y")]
    third = client.ask([user("sum up"), *both], assistant("xy"))
    assert len({client.episode_of(record) for record in (*ones, third)}) == 1
    client.forget()
    for name in {record.episode.id for record in ones}:
        again = client.ask([user("by name")], assistant("z"), episode=name)
        assert client.episode_of(again) == client.episode_of(third), "both ids stay good"


# -- sides ---------------------------------------------------------------------------------------------------------


def on_side(store: TraceStore, side: str, start: int = 0) -> str:
    """A first message that is drawn to this side."""
    draw = SideDraw(store.database.secret("episode_sides"))
    texts = (f"question {number}" for number in range(start, start + 1000))
    return next(text for text in texts if draw.draw(read_conversation("", [user(text)], None).group) == side)


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_equal_first_messages_and_tools_are_on_one_side_and_what_is_stitched_inherits(
    client: Client, side: str
) -> None:
    text = on_side(client.store, side)
    first = client.ask([user(text)], assistant("a"))
    other_key = client.ask([system("s"), user(f"  {text}\n")], assistant("b"), key_id="key-b")
    later = client.ask([user(text), assistant("a"), user("next")], assistant("c"))
    named = [
        client.ask([user(words)], assistant("d"), episode="run") for words in (text, on_side(client.store, "train"))
    ]
    assert {client.side_of(record) for record in (first, other_key, later, *named)} == {side}


def test_the_share_is_kept_over_many_episodes(store: TraceStore) -> None:
    draw = SideDraw(b"k" * 32, 0.25)
    groups = [str(number).encode() for number in range(4000)]
    assert 900 < sum(draw.draw(group) == "held_out" for group in groups) < 1100
    assert {SideDraw(b"k" * 32, 0.0).draw(group) for group in groups} == {"train"}
    assert {SideDraw(b"k" * 32, 1.0).draw(group) for group in groups} == {"held_out"}


def test_a_group_keeps_its_side_when_the_share_changes(client: Client) -> None:
    text = on_side(client.store, "train")
    client.ask([user(text)], assistant("a"))
    client.store = TraceStore(client.store.database, held_out_share=1.0)
    assert client.side_of(client.ask([user(text)], assistant("b"))) == "train"
    assert client.side_of(client.ask([user("another")], assistant("b"))) == "held_out"


def test_the_tools_are_part_of_the_group(store: TraceStore) -> None:
    groups = {
        read_conversation("", [user("x")], tools).group
        for tools in (None, [tool("a")], [tool("b")], [tool("a"), tool("b")])
    }
    assert len(groups) == 4


@pytest.mark.parametrize("is_named", [False, True])
def test_where_two_sides_meet_both_are_held_out(client: Client, is_named: bool) -> None:
    """Also when an explicit name keeps the episodes apart."""
    calls = [call("search"), call("search")]
    texts = [on_side(client.store, "train"), on_side(client.store, "held_out")]
    ones = [client.ask([user(text)], assistant(None, asked)) for text, asked in zip(texts, calls, strict=True)]
    assert [client.side_of(record) for record in ones] == ["train", "held_out"]
    both = [result(asked["id"], "x") for asked in calls]
    train = on_side(client.store, "train", start=2000)
    third = client.ask([user(train), *both], assistant("y"), episode="run" if is_named else None)
    assert {client.side_of(record) for record in (*ones, third)} == {"held_out"}
    assert len({client.episode_of(record) for record in (*ones, third)}) == (3 if is_named else 1)


def test_two_servers_stitch_and_draw_alike(database_url: str) -> None:
    ours, theirs = (Client(TraceStore(open_database(database_url))) for _ in range(2))
    first = ours.ask([user("x")], assistant("y"))
    second = theirs.ask([user("x"), assistant("y"), user("z")], assistant("w"))
    third = ours.ask([user("x"), assistant("y"), user("z"), assistant("w"), user("v")], assistant("u"))
    named = [server.ask([user("n")], assistant("m"), episode="run") for server in (ours, theirs)]
    assert {ours.episode_of(record) for record in (first, second, third)} == {first.episode.id}
    assert len({ours.episode_of(record) for record in named}) == 1
    for server in (ours, theirs):
        server.store.database.close()


def test_two_servers_keep_agents_with_one_first_turn_apart(database_url: str) -> None:
    """Each of a pair is answered first by another server, and goes on where the other began; also after a third one."""
    servers = [Client(TraceStore(open_database(database_url))) for _ in range(3)]
    begin = [user("start")]
    firsts = [servers[n].ask(begin, assistant(None, call("look"))) for n in (0, 1)]
    for n in (0, 1):
        said = dict(firsts[n].answers[0].message)
        second = servers[1 - n].ask([*begin, said, result(said["tool_calls"][0]["id"], "x")], assistant("y"))
        assert (second.episode.id, second.episode.others) == (firsts[n].episode.id, ())
    for text, order in (("Hi", (1, 0)), ("Hello", (2, 1)), ("Hey", (2, 0))):
        ours = {servers[n].ask([user(text)], assistant("yes?")).episode.id for n in (0, 1)}
        seconds = [servers[n].ask([user(text), assistant("yes?"), user("so")], assistant("no")) for n in order]
        assert {record.episode.id for record in seconds} == ours
    for server in servers:
        server.store.database.close()


def test_in_one_commit_a_new_episode_is_made_once(client: Client) -> None:
    first = make_record([user("a")])
    records = [first, make_record([user("b")], episode=first.episode), make_record([user("a")])]
    client.store.write(records)
    assert client.episode_of(records[0]) == client.episode_of(records[1]) != client.episode_of(records[2])
    assert client.side_of(records[0]) == client.side_of(records[2])


def test_without_the_database_the_episode_is_a_new_one(sqlite_url: str) -> None:
    database = open_database(sqlite_url)
    found = Episodes(database)
    database.engine.dispose()
    path = sqlite_url.removeprefix("sqlite:///")
    with open(path, "wb") as file:
        file.write(b"x" * 10_000)
    conversation = read_conversation("", [user("a"), assistant("b"), user("c")], None)
    assert asyncio.run(found.resolve("", conversation)).others == ()
    assert asyncio.run(found.resolve("", conversation, name="ep-" + "0" * 32)).name is not None
    database.close()


def test_merged_rows_point_at_the_root_itself(client: Client) -> None:
    """A merge of merges must not make chains: readers follow one step."""
    calls = [call("s") for _ in range(4)]
    for number, asked in enumerate(calls):
        client.ask([user(f"t{number}")], assistant(None, asked))
    results = [result(asked["id"], "x") for asked in calls]
    client.ask([user("p"), results[2], results[3]], assistant("a"))
    client.ask([user("q"), results[1], results[2]], assistant("b"))
    client.ask([user("r"), results[0], results[3]], assistant("c"))
    with client.store.database.read() as connection:
        rows = connection.execute(select(episodes.c.seq, episodes.c.merged_into).order_by(episodes.c.seq)).all()
    assert [row.merged_into for row in rows] == [None] + [rows[0].seq] * (len(rows) - 1)
