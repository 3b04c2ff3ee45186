"""From tokens to certain text: nothing depends on how the engine cuts tokens into outputs."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.backends.text_pipe import TextPipe
from server.engine.params import EngineOutput, TokenLogprob
from server.errors import ServerUnavailableError
from server.text.detokenizer import Detokenizer
from tests.server.openai.scripted import byte_tokenizer, bytes_to_ids

TOKENIZER = byte_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")


def outputs(raw: bytes, cuts: Sequence[int], *, logprobs: bool) -> list[EngineOutput]:
    """`raw` and an end token, cut into outputs of the given lengths."""
    token_ids = [*bytes_to_ids(TOKENIZER, raw), END]
    made, start = [], 0
    for cut in [*cuts, len(token_ids)]:
        piece = token_ids[start : start + cut]
        start += cut
        is_last = start >= len(token_ids)
        made.append(
            EngineOutput(
                token_ids=piece,
                logprobs=[TokenLogprob(i, -1.0) for i in piece] if logprobs else None,
                finish_reason="stop" if is_last else None,
                stop_token_id=END if is_last else None,
            )
        )
        if is_last:
            break
    return made


def run(made: Sequence[EngineOutput], stops: Sequence[str]) -> tuple[str, list[tuple[int, int]], str | None, int]:
    pipe = TextPipe(Detokenizer(TOKENIZER), stops)
    text, entries = "", []
    for output in made:
        more, logprobs = pipe.push(output)
        text += more
        entries += [(offset, entry.token_id) for offset, entry in logprobs]
        if pipe.finish_reason is not None:
            break
    return text, entries, pipe.finish_reason, pipe.num_tokens


RAW = st.lists(st.sampled_from(["a", "ab", "é", "😀", " ", "END", "EN"]), max_size=20).map("".join)


@given(RAW, st.lists(st.integers(1, 7), max_size=40), st.booleans(), st.sampled_from([[], ["END"], ["b é", "END"]]))
def test_any_cutting_gives_the_same(text: str, cuts: list[int], logprobs: bool, stops: list[str]) -> None:
    whole = run(outputs(text.encode(), [], logprobs=logprobs), stops)
    assert run(outputs(text.encode(), cuts, logprobs=logprobs), stops) == whole


@given(RAW, st.lists(st.integers(1, 7), max_size=40))
def test_logprobs_belong_to_the_text(text: str, cuts: list[int]) -> None:
    shown, entries, reason, _ = run(outputs(text.encode(), cuts, logprobs=True), ["END"])
    assert b"".join(TOKENIZER.token_bytes(token_id) for _, token_id in entries).decode() == shown
    assert shown == text.partition("END")[0]
    assert reason == "stop"


def test_without_a_stop_string_every_token_has_an_entry() -> None:
    torn = "é".encode()[:1]
    shown, entries, _, num_tokens = run(outputs(b"a" + torn, [1, 1], logprobs=True), [])
    assert shown == "a\ufffd"
    assert [offset for offset, _ in entries] == [0, 1]
    assert num_tokens == 3  # the end token is counted


def test_a_stop_string_completed_by_the_last_bytes() -> None:
    shown, _, reason, num_tokens = run(outputs(b"one. two.", [9], logprobs=False), ["two."])
    assert (shown, reason, num_tokens) == ("one. ", "stop", 9)


def test_half_a_stop_string_at_the_end_is_text() -> None:
    assert run(outputs(b"one tw", [1] * 6, logprobs=False), ["two"])[0] == "one tw"


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_a_sequence_that_failed_raises_its_reason(reason: str) -> None:
    pipe = TextPipe(Detokenizer(TOKENIZER), [])
    with pytest.raises(ServerUnavailableError, match="why"):
        pipe.push(EngineOutput(finish_reason=reason, error="why"))  # type: ignore[arg-type]


def test_cached_tokens_are_those_of_the_beginning() -> None:
    pipe = TextPipe(Detokenizer(TOKENIZER), [])
    pipe.push(EngineOutput(token_ids=[1], num_cached_tokens=32))
    pipe.push(EngineOutput(token_ids=[1], num_cached_tokens=0))
    assert pipe.num_cached_tokens == 32
