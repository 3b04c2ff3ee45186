"""Whole runs, tiny: from lines of dialogues to a file that the server opens; resumed, begun from a model, in stages."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune.qat.curriculum as curriculum
from finetune.dataset.errors import DialogueError
from finetune.dataset.render import Renderer
from finetune.errors import DivergedError, TrainingError
from finetune.packed import Example
from finetune.qat.config import load_qat_settings
from finetune.qat.curriculum import Stage
from finetune.qat.data import Lessons, with_answer_weight
from finetune.qat.export import ACTIVATIONS, ACTIVATIONS_KEY
from finetune.qat.folder import CURVE, METRICS, MODEL, VOCABULARY
from finetune.qat.phase import Done, Phase, Tools
from finetune.qat.run import run
from quant.formats import GGMLType
from quant.model_file import open_model
from server import cli
from server.errors import ConfigError
from tests.finetune.qat.tiny_runs import TINY, quiet, tiny, write_birds
from tests.tiny_models import write_tiny_gguf


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_birds(tmp_path / "birds.jsonl")


def test_a_killed_run_goes_on_and_its_file_is_served(data: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(step: int, num_steps: int) -> None:
        if step == 5:
            raise KilledError

    settings = tiny(copying=0.5)
    facts = run(data, tmp_path / "one", settings, quiet())
    with pytest.raises(KilledError):
        run(data, tmp_path / "two", settings, quiet(kill))
    again = run(data, tmp_path / "two", settings, quiet())
    assert (tmp_path / "one" / MODEL).read_bytes() == (tmp_path / "two" / MODEL).read_bytes()
    assert again["held_out"] == facts["held_out"]
    logged = [json.loads(text) for text in (tmp_path / "one" / METRICS).read_text().splitlines()]
    assert [one["step"] for one in logged] == list(range(1, 7))
    assert logged[2]["held_out_accuracy"] is not None
    assert (tmp_path / "one" / CURVE).read_text().startswith("<svg")
    file = open_model(Path(facts["model"]))
    assert file.tensors["blk.0.ffn_down.weight"].type is GGMLType.TQ2_0
    assert file.config.vocab_size == 300
    file.close()
    assert Renderer.open(Path(facts["model"])).tokenizer.vocab_size == 300
    with pytest.raises(TrainingError, match="learning_rate differ"):
        run(data, tmp_path / "one", tiny(copying=0.5, learning_rate=1.0), quiet())
    with pytest.raises(TrainingError, match="has 300 tokens, vocab_size is 310"):
        run(data, tmp_path / "one", tiny(vocab_size=310), quiet())


def test_from_a_model_and_with_a_teacher(data: Path, tmp_path: Path) -> None:
    """Weights become ternary in four of six steps; rows of 64 have a place in Q4_0 only."""
    base = write_tiny_gguf(tmp_path / "base.gguf", hidden=64, ffn=128, heads=4, kv_heads=2)
    settings = tiny(base=base, teacher=base, group=64, ternary_after=0.6, learning_rate=1e-4, ternary="absmax")
    facts = run(data, tmp_path / "out", settings, quiet())
    logged = [json.loads(text) for text in (tmp_path / "out" / METRICS).read_text().splitlines()]
    assert [one["share"] for one in logged] == pytest.approx([0, 1 / 3.6, 2 / 3.6, 3 / 3.6, 1, 1])
    file = open_model(Path(facts["model"]))
    assert file.tensors["blk.0.attn_q.weight"].type is GGMLType.Q4_0
    file.close()
    with pytest.raises(TrainingError, match="must share one vocabulary"):
        run(data, tmp_path / "other", tiny(teacher=base), quiet())


def test_it_can_begin_with_attention_that_copies(data: Path, tmp_path: Path) -> None:
    facts = run(data, tmp_path / "out", tiny(layers=2, max_steps=2, induction=True), quiet())
    file = open_model(Path(facts["model"]))
    assert file.config.rope_theta == 1e6
    file.close()
    with pytest.raises(ConfigError, match="a base brings its own weights"):
        load_qat_settings({"induction": True, "base": "model.gguf"}, environ={})


def test_it_can_begin_with_the_weights_of_another_run(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "first", tiny(), quiet())
    settings = tiny(weights_from=tmp_path / "first", max_steps=1, learning_rate=1e-12, seed=1)
    run(data, tmp_path / "second", settings, quiet())
    trained = load_file(tmp_path / "first/checkpoints/step-00000006/parameters.safetensors")
    begun = load_file(tmp_path / "second/checkpoints/step-00000001/parameters.safetensors")
    assert trained.keys() == begun.keys()
    assert all(begun[name].allclose(trained[name], atol=1e-9) for name in trained)
    assert (tmp_path / "first" / VOCABULARY).read_bytes() == (tmp_path / "second" / VOCABULARY).read_bytes()


def test_weights_of_a_run_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "first", tiny(), quiet())
    with pytest.raises(TrainingError, match=r"another shape \(num_layers differ\)"):
        run(data, tmp_path / "deeper", tiny(weights_from=tmp_path / "first", layers=2), quiet())
    with pytest.raises(TrainingError, match=r"vocabulary\.json is no file"):
        run(data, tmp_path / "second", tiny(weights_from=tmp_path / "nowhere"), quiet())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / VOCABULARY).write_text("{}")
    with pytest.raises(TrainingError, match="another vocabulary"):
        run(data, tmp_path / "other", tiny(weights_from=tmp_path / "first"), quiet())
    shutil.rmtree(tmp_path / "first/checkpoints")
    with pytest.raises(TrainingError, match="no checkpoint to begin with"):
        run(data, tmp_path / "third", tiny(weights_from=tmp_path / "first"), quiet())
    with pytest.raises(ConfigError, match="begins with one of them"):
        load_qat_settings({"weights_from": "run", "base": "model.gguf"}, environ={})


def test_answers_can_weigh_less_than_calls() -> None:
    ids, weights = np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], np.float32)
    call, answer = (Example(name, ids, weights, cluster=name, is_call=name == "call") for name in ("call", "answer"))
    lessons = Lessons([call, answer], [0.0, 0.0], [answer], [0.0], "sha256:0", 0)
    lighter = with_answer_weight(lessons, 0.25)
    assert lighter.examples[0].weights.tolist() == [0, 0, 1, 1, 1, 1]
    assert lighter.examples[1].weights.tolist() == [0, 0, 1, 0.25, 0.25, 1]
    assert lighter.held_out[0].weights.tolist() == [0, 0, 1, 1, 1, 1]
    assert answer.weights.tolist() == [0, 0, 1, 1, 1, 1]


def test_what_cannot_be_a_base(data: Path, tmp_path: Path) -> None:
    qwen = write_tiny_gguf(tmp_path / "qwen.gguf", architecture="qwen2")
    with pytest.raises(TrainingError, match="architecture qwen2"):
        run(data, tmp_path / "out", tiny(base=qwen), quiet())


SPELLS_A_MARKER = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x <|im_end|> y"}]}\n'
)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"\n", "line 3: the line is empty"),
        (b'{"messages": \n', "line 3: Expecting value"),
        (b'{"messages": []}\n', "line 3: 'messages' has no assistant message"),
        (b'{"messages": "hello"}\n', "line 3: 'messages' must be a list of objects"),
        (SPELLS_A_MARKER, "line 3: the answer"),
    ],
)
def test_a_broken_line_is_named(bad: bytes, message: str, data: Path, tmp_path: Path) -> None:
    lines = data.read_bytes().splitlines(keepends=True)
    data.write_bytes(b"".join([*lines[:2], bad, *lines[2:]]))
    with pytest.raises(DialogueError, match=rf"birds\.jsonl, {message}"):
        run(data, tmp_path / "out", tiny(), quiet())
    assert not (tmp_path / "out" / MODEL).exists()


def test_no_data_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DialogueError, match=r"empty\.jsonl is empty"):
        run(tmp_path / "empty.jsonl", tmp_path / "out", tiny(), quiet())
    with pytest.raises(DialogueError, match="is no file"):
        run(tmp_path / "nothing.jsonl", tmp_path / "out", tiny(), quiet())


STAGES = (
    Stage("foundation", 0.5, 0.5, 0.0, 2.0, 0.0),  # nobody is that good: its share of the steps ends it
    Stage("mastery", 1.0, 0.5, 1.1, 0.0, 100.0),  # nor fit to enter; anything completes it
)


def test_a_curriculum_goes_back_when_a_stage_diverges(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum.run_curriculum, "__defaults__", (STAGES,))
    tried: list[tuple[str | None, float]] = []
    begun: list[torch.Tensor] = []
    real = curriculum.run_phase

    def run_phase(phase: Phase, tools: Tools) -> Done:
        tried.append((phase.name, phase.rate_factor))
        begun.append(tools.model.parameters()["blk.0.ffn_up.weight"].detach().clone())
        if len(tried) == 3:
            with torch.no_grad():
                tools.model.parameters()["blk.0.ffn_up.weight"].mul_(100)
            raise DivergedError("the loss is nan")
        return real(phase, tools)

    monkeypatch.setattr(curriculum, "run_phase", run_phase)
    facts = run(data, tmp_path / "out", tiny(curriculum=True), quiet())
    assert tried == [("foundation", 1.0), ("foundation again", 1.0), ("mastery", 1.0), ("mastery 2", 0.5)]
    assert torch.equal(begun[2], begun[3])
    assert not torch.equal(begun[0], begun[1])
    assert [one["stage"] for one in facts["stages"]] == ["foundation", "foundation again", "mastery"]
    assert facts["stages"][2]["diverged"] == ["the loss is nan"]
    assert [one["is_complete"] for one in facts["stages"]] == [False, False, True]
    before = (tmp_path / "out" / MODEL).read_bytes()
    assert run(data, tmp_path / "out", tiny(curriculum=True), quiet())["stages"] == facts["stages"]
    assert len(tried) == 4
    assert (tmp_path / "out" / MODEL).read_bytes() == before


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "nano.toml"
    config.write_text("[train]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in TINY.items()))
    command = ["train", str(data), str(tmp_path / "out"), "--config", str(config), "--max-steps", "1", "--json"]
    assert cli.main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_steps"] == 1
    assert facts["memory"]["total"] > 0
    assert gguf.GGUFReader(facts["model"]).fields[ACTIVATIONS_KEY].contents() == ACTIVATIONS
    assert cli.main([*command, "--hidden-size", "100"]) == 1
    assert "hidden_size is 100, accepted are multiples of 256" in capsys.readouterr().err
    assert cli.main([*command, "--optimiser", "adamw"]) == 2
    assert "--optimiser" in capsys.readouterr().err


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"--layers: '0' is not accepted"):
        load_qat_settings({"layers": "0"}, environ={})
    with pytest.raises(ConfigError, match="warmup_share and decay_share together are above 1"):
        load_qat_settings({"warmup_share": "0.9", "decay_share": "0.9"}, environ={})
