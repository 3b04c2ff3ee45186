"""The small vocabulary and its template: the same bytes every time, read by the server as training writes it."""

from pathlib import Path

import numpy as np
import pytest

from finetune.dataset.dialogues.examples import Dialogue, turns
from finetune.dataset.dialogues.vocabulary import (
    MARKERS,
    SmallVocabulary,
    chat_template,
    tokenize,
    train_vocabulary,
)
from finetune.dataset.errors import DialogueError
from finetune.dataset.render import Renderer, chat_request
from quant.gguf_reader import read_header
from quant.gguf_writer import write_gguf
from quant.model_types import TokenizerSource
from server.openai.protocol.chat import ChatRequest
from server.text.tokenizer import build_tokenizer
from server.tools.constraint import ConstraintFactory
from tests.server.text.peer import llamacpp_tokens

SIZE = 1024
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'How many words are in "a b"?'},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "count_words", "arguments": '{"text": "a b"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": '{"result": 2}'},
    {"role": "assistant", "content": "It has 2 words.", "reasoning_content": "The result is there."},
]
TOOL = {
    "type": "function",
    "function": {"name": "count_words", "description": "Count", "parameters": {"type": "object"}},
}
RENDERED = """<|im_start|>system
Be brief.
Tools:
{"name":"count_words","description":"Count","parameters":{"type":"object"}}<|im_end|>
<|im_start|>user
How many words are in "a b"?<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "count_words", "arguments": {"text": "a b"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
{"result": 2}
</tool_response><|im_end|>
<|im_start|>assistant
<think>
The result is there.
</think>

It has 2 words.<|im_end|>
"""


@pytest.fixture(scope="module")
def vocabulary(tiny_dialogues: list[Dialogue]) -> SmallVocabulary:
    return train_vocabulary([one for one in tiny_dialogues if one.part == "train"], SIZE)


@pytest.fixture(scope="module")
def renderer(vocabulary: SmallVocabulary) -> Renderer:
    return vocabulary.renderer()


def test_the_same_dialogues_give_the_same_vocabulary(
    vocabulary: SmallVocabulary, tiny_dialogues: list[Dialogue], tmp_path: Path
) -> None:
    again = train_vocabulary((one for one in tiny_dialogues if one.part == "train"), SIZE)
    assert again == vocabulary
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == SIZE
    vocabulary.save(tmp_path / "vocabulary.json")
    assert SmallVocabulary.load(tmp_path / "vocabulary.json") == vocabulary


def test_too_few_dialogues_and_no_vocabulary_at_all_are_refused(tiny_dialogues: list[Dialogue], tmp_path: Path) -> None:
    with pytest.raises(DialogueError, match="make more of them"):
        train_vocabulary(tiny_dialogues[:20], 4096)
    with pytest.raises(DialogueError, match="more than the 265"):
        train_vocabulary(tiny_dialogues, 200)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DialogueError, match=r"broken.json is no vocabulary"):
        SmallVocabulary.load(tmp_path / "broken.json")


def test_the_template_renders_tools_calls_results_and_thinking(renderer: Renderer) -> None:
    request = ChatRequest.model_validate({"model": "-", "messages": MESSAGES[:-1], "tools": [TOOL]})
    assert renderer.planner.tool_format.name == "hermes"
    assert renderer.planner.render(request, answer=MESSAGES[-1]) == RENDERED
    plain = ChatRequest.model_validate({"model": "-", "messages": MESSAGES[1:2]})
    assert renderer.planner.render(plain) == (
        '<|im_start|>user\nHow many words are in "a b"?<|im_end|>\n<|im_start|>assistant\n'
    )


def test_every_turn_comes_back_from_the_servers_parsers(renderer: Renderer, tiny_dialogues: list[Dialogue]) -> None:
    """`tokenize` goes through `Renderer.answer`, which reads each answer back and refuses what differs."""
    num_tokens = []
    for one in tiny_dialogues[::3]:
        examples = tokenize(renderer, one)
        assert len(examples) == len(turns(one))
        for example, turn in zip(examples, turns(one), strict=True):
            prompt = renderer.prompt(chat_request(turn.request))
            assert example.token_ids[: len(prompt)].tolist() == prompt
            assert (example.weights[: len(prompt)] == 0).all()
            assert (example.weights[len(prompt) :] == 1).all()
            assert example.token_ids[-1] == renderer.tokenizer.eos_token_id
            assert example.is_call == (bool(turn.expected) if one.tools else None)
            num_tokens.append(len(example.token_ids))
    assert np.mean(num_tokens) < 400


def test_numbers_are_digits_wherever_they_stand(renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    digits = [tokenizer.token_to_id(digit) for digit in "1837"]
    for text in ("add 1837 to it", '{"a": 1837}', "(1837)"):
        ids = tokenizer.encode(text, add_special=True, parse_special=True)
        start = ids.index(digits[0])
        assert ids[start : start + 4] == digits
    for text in ("Überraschung 🙂 naïve\n\n  x", *MARKERS):
        ids = tokenizer.encode(text, add_special=True, parse_special=True)
        assert tokenizer.decode(ids, skip_special=False) == text
    assert all(len(tokenizer.encode(text, add_special=False, parse_special=True)) == 1 for text in MARKERS)


def test_an_answer_is_one_that_a_forced_call_allows(renderer: Renderer, tiny_dialogues: list[Dialogue]) -> None:
    """Constrained decoding does not push a model off what it has learned: layout, and the order of arguments."""
    tokenizer = renderer.tokenizer
    factory = ConstraintFactory(tokenizer, mask_words=-(-tokenizer.vocab_size // 32))
    called = [(one, turn) for one in tiny_dialogues[::7] for turn in turns(one) if turn.expected]
    assert len(called) > 50
    for one, turn in called:
        message = {key: value for key, value in turn.message.items() if key != "reasoning_content"}
        answer = renderer.answer(chat_request(turn.request), message)
        compiled = factory.forced_tools(list(one.tools), renderer.planner.tool_format, name=None, parallel=False)
        grammar = compiled.new()
        assert all(grammar.advance(token_id) for token_id in answer.answer_ids), message


def test_a_gguf_file_holds_the_same_tokenizer(
    vocabulary: SmallVocabulary, renderer: Renderer, tiny_dialogues: list[Dialogue], tmp_path: Path
) -> None:
    path = tmp_path / "vocabulary.gguf"
    write_gguf(path, {"general.architecture": "llama", **vocabulary.described().metadata()}, [])
    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in read_header(path.read_bytes(), path).metadata.items()
        if key.startswith("tokenizer.")
    }
    read = build_tokenizer(TokenizerSource("gguf", metadata), SIZE)
    assert read.digest == renderer.tokenizer.digest
    assert read.chat_template_text == chat_template()
    for one in tiny_dialogues[::50]:
        assert read.encode_chat(one.request) == renderer.tokenizer.encode_chat(one.request)


@pytest.mark.real_peer
def test_llamacpp_tokenizes_dialogues_as_we_do(
    vocabulary: SmallVocabulary, renderer: Renderer, tiny_dialogues: list[Dialogue], tmp_path: Path
) -> None:
    path = tmp_path / "vocabulary.gguf"
    config = {"general.architecture": "llama", "llama.context_length": 512, "llama.embedding_length": 256,
              "llama.block_count": 1, "llama.feed_forward_length": 256, "llama.attention.head_count": 4,
              "llama.attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    write_gguf(path, {**config, **vocabulary.described().metadata()}, [])
    tokenizer = renderer.tokenizer
    rendered = []
    for one in tiny_dialogues[::5]:
        turn = turns(one)[-1]
        rendered.append(renderer.planner.render(chat_request(turn.request)))
    answer = llamacpp_tokens(path, rendered, add_special=False)
    assert [tokenizer.encode_chat(text) for text in rendered] == answer["ids"]
    assert tokenizer.eog_token_ids == frozenset(answer["eog"])
    assert [tokenizer.token_bytes(i).hex() for i in range(tokenizer.vocab_size)] == answer["pieces"]
