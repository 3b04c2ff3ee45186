"""The model in models/: its file in llama.cpp, and that a server with it does its job."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from finetune.dataset.dialogues.generate import Options, generate
from finetune.dataset.dialogues.toolbox import TOOLS
from finetune.dataset.render import Renderer
from finetune.packed import Example
from finetune.qat.data import Source, read_lessons
from tests.finetune.qat.test_end_to_end import serving
from tests.quant.peer_logits import compare_logits, llamacpp_logits, our_logits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
MODEL = ROOT / "models" / "sterna-nano-tools" / "model.gguf"


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is read of it are its validation families, which no training set has."""
    folder = tmp_path_factory.mktemp("shipped") / "dialogues"
    generate(folder, Options(templates=100))
    return folder


QUESTIONS = {
    "How many miles are 12 km?": ("convert_length", {"value": 12, "from_unit": "km", "to_unit": "mi"}),
    "What is 35 times 12?": ("arithmetic", {"operation": "multiply", "a": 35, "b": 12}),
    "Reverse the text 'hello world'.": ("reverse_text", {"text": "hello world"}),
}


def test_it_calls_tools_for_the_openai_client(tmp_path: Path) -> None:
    """Two of three: a near tie may fall otherwise with another instruction set."""
    names = ("convert_length", "arithmetic", "reverse_text", "add_days")
    tools: Any = [TOOLS[name].signature() for name in names]
    right = 0
    with serving(str(MODEL.parent), tmp_path) as url, OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        for question, expected in QUESTIONS.items():
            answer = client.chat.completions.create(
                model="sterna-nano-tools",
                messages=[{"role": "user", "content": question}],
                tools=tools,
                temperature=0,
                max_tokens=80,
            )
            for call in answer.choices[0].message.tool_calls or []:
                assert call.type == "function"
                print(question, call.function)
                right += (call.function.name, json.loads(call.function.arguments)) == expected
    assert right >= 2


@pytest.mark.real_peer
def test_it_is_the_same_model_in_llamacpp(dialogues: Path, tmp_path: Path) -> None:
    """llama.cpp rounds activations by 256, we by 32, so near ties fall otherwise: most of them in what the model never
    had to predict, the tools in the prompt."""
    examples = held_out(dialogues, tmp_path)
    texts = [one.token_ids.astype(np.int32) for one in examples]
    ours, theirs = our_logits(MODEL, texts), llamacpp_logits(MODEL, texts, tmp_path / "logits.npz")
    everything = compare_logits(ours, theirs, texts)
    answers = compare_logits(ours, theirs, texts, [np.flatnonzero(one.weights) - 1 for one in examples])
    print(f"all {everything}, answers {answers}")
    assert everything.positions >= 10_000
    assert everything.top1 >= 0.95
    assert answers.positions >= 1_000
    assert answers.top1 >= 0.995
    assert answers.widest_gap < 0.2
    for found in (everything, answers):
        assert found.perplexities[0] == pytest.approx(found.perplexities[1], rel=0.005)


def held_out(dialogues: Path, folder: Path) -> list[Example]:
    lessons = read_lessons(Source(dialogues), Renderer.open(MODEL), folder, 1024)
    return list(lessons.held_out[:: max(1, len(lessons.held_out) // 120)])
