"""What benchmarks/train_step.py trains on: steps of (token ids, index of the first token with loss).

`full` is random tokens; `traces` and `agent` are the demonstration's questions (Berkeley Function Calling Leaderboard,
`simple_python` and `multiple`), rendered and tokenized by the server's code. `traces` are two thirds of the calls and
of the requests that no tool fits, and a step has those that a round puts into one. Also writes the default model as a
Hugging Face directory, dequantized, for the peer. Nothing here is timed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.config import FinetuneSettings
from finetune.dataset.bfcl import NoCall, Question, fetch, misfits, read_questions, split
from finetune.dataset.examples import Lessons
from finetune.dataset.packing import chain_rows
from finetune.dataset.render import Renderer
from finetune.demo.demo import Options
from finetune.model.model import TrainModel
from finetune.packed import Example, Packed
from finetune.rounds.training import round_steps
from quant.hf_names import hf_name
from quant.model_file import open_model
from server.openai.protocol.chat import ChatRequest

KINDS = ("full", "traces", "agent")
EXAMPLES_A_STEP = 8
"""Of an agent's."""
AGENT_TOOLS = 10
"""Tools in the agent's prompt: about 1,500 tokens, the size of a small agent's."""

Step = list[tuple[list[int], int]]


def make_steps(kind: str, model: Path, cache: Path, *, num_steps: int) -> list[Step]:
    """Deterministic; every call gives the same steps."""
    rng = np.random.default_rng(0)
    if kind == "full":
        file = open_model(model)
        vocab = file.config.vocab_size
        file.close()
        return [[(rng.integers(0, vocab, 256).tolist(), 1) for _ in range(4)] for _ in range(num_steps)]
    renderer, questions = Renderer.open(model), read_questions(fetch(cache))
    if kind == "traces":
        return _round_steps(_demo_examples(renderer, questions, rng), num_steps)
    num = num_steps * EXAMPLES_A_STEP
    named = {one.tools[0]["function"]["name"]: one for one in questions if one.set == "simple_python"}
    picked = list(named.values())[:AGENT_TOOLS]  # several questions have the same tool
    tools = [tool for one in picked for tool in one.tools]
    examples = [_example(renderer, picked[i], tools, picked[i].answer) for i in rng.integers(0, len(picked), num)]
    return [examples[i : i + EXAMPLES_A_STEP] for i in range(0, num, EXAMPLES_A_STEP)]


def _demo_examples(renderer: Renderer, questions: Sequence[Question], rng: np.random.Generator) -> Step:
    learned, _ = split(questions, seed=0)
    refused = [one for one in misfits(learned, seed=0) if rng.random() < Options.misfit_share]
    calls = [_example(renderer, one, one.tools, one.answer) for one in learned]
    return calls + [_example(renderer, one, one.tools, {"role": "assistant", "content": one.answer}) for one in refused]


def _round_steps(examples: Step, num_steps: int) -> list[Step]:
    """The first of a round's with its default settings."""
    named = [
        Example(str(number), np.array(ids, np.int32), (np.arange(len(ids)) >= first_loss).astype(np.float32), "")
        for number, (ids, first_loss) in enumerate(examples)
    ]
    known = {tuple(ids): (ids, first_loss) for ids, first_loss in examples}
    steps = round_steps(Lessons(named, []), {}, FinetuneSettings.model_validate({}))
    return [[known[ids] for packed in steps(step) for ids in _token_ids(packed)] for step in range(num_steps)]


def _token_ids(packed: Packed) -> list[tuple[int, ...]]:
    """Of its examples, none of which is the beginning of another: every one ends with an end of turn."""
    parents = {segment.parent for segment in packed.segments}
    leaves = [number for number in range(len(packed.segments)) if number not in parents]
    return [tuple(packed.token_ids[chain_rows(packed.segments, leaf)].tolist()) for leaf in leaves]


def _example(
    renderer: Renderer, asked: Question | NoCall, tools: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]
) -> tuple[list[int], int]:
    request = ChatRequest.model_validate({"model": "any", "messages": asked.messages, "tools": list(tools)})
    rendered = renderer.answer(request, answer)
    return [*rendered.prompt_ids, *rendered.answer_ids], len(rendered.prompt_ids)


def write_directory(model: TrainModel, directory: Path) -> None:
    """The same weights for transformers, in bf16. Llama architecture without biases only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    assert c.architecture == "llama", "the peer is written for llama models"
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            max_position_embeddings=c.context_length,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tie_embeddings,
        )
    ).bfloat16()
    state = peer.state_dict()
    with torch.no_grad():
        for name, values in model.frozen.dense_tensors():
            state[hf_name(name)].copy_(values)
        peer.tie_weights()
    peer.save_pretrained(directory)
