"""What benchmarks/train_step.py trains on: steps of (token ids, index of the first token with loss).

`full` is random tokens; `traces` and `agent` are the demonstration's questions (Berkeley Function Calling Leaderboard,
`simple_python` and `multiple`), rendered and tokenized by the server's code. Also writes the default model as a Hugging
Face directory, dequantized, for the peer. Nothing here is timed.
"""

from pathlib import Path

import numpy as np
import torch

from finetune.dataset.bfcl import Question, fetch, read_questions
from finetune.dataset.render import Renderer
from finetune.model.model import TrainModel
from quant.hf_names import hf_name
from quant.model_file import open_model
from server.openai.protocol.chat import ChatRequest

KINDS = ("full", "traces", "agent")
EXAMPLES_A_STEP = 8
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
    num = num_steps * EXAMPLES_A_STEP
    picked = [questions[i] for i in rng.permutation(len(questions))[:num]]
    if kind == "agent":
        named = {one.tools[0]["function"]["name"]: one for one in questions if one.set == "simple_python"}
        picked = list(named.values())[:AGENT_TOOLS]  # several questions have the same tool
        tools = [tool for one in picked for tool in one.tools]
        examples = [_example(renderer, picked[i], tools) for i in rng.integers(0, len(picked), num)]
    else:
        examples = [_example(renderer, one, list(one.tools)) for one in picked]
    return [examples[i : i + EXAMPLES_A_STEP] for i in range(0, num, EXAMPLES_A_STEP)]


def _example(renderer: Renderer, question: Question, tools: list) -> tuple[list[int], int]:
    request = ChatRequest.model_validate({"model": "any", "messages": question.messages, "tools": tools})
    rendered = renderer.answer(request, question.answer)
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
