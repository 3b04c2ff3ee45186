"""`sterna quantize`: the file, the table, the numbers, and a single line for every fault."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.model_file import open_model
from server import cli
from server.config import DEFAULT_MODEL
from server.engine.perplexity import window_logprobs
from server.engine.weights import load_core
from server.text.tokenizer import build_tokenizer
from tests.quant.packed_checkpoints import pack_uint8, save_mixed
from tests.tiny_models import hf_name, tiny_weights, write_tiny_gguf, write_tiny_hf
from tests.tiny_weights import TinyShape

WIDE: dict[str, Any] = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)


def quantize(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["quantize", *arguments]) == 0
    return capsys.readouterr().out


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["quantize", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return code, captured.err.strip()


def test_a_directory_becomes_a_model_that_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_model(write_tiny_hf("hf", **WIDE))
    line = quantize(capsys, "hf", "m.gguf", "--type", "TQ2_0", "--keep", "*.attn_v.*=q8_0", "--json",
                    "--evaluate", "text.txt", "--threads", "1")  # fmt: skip
    result = json.loads(line)
    written = open_model("m.gguf")
    assert {row["name"]: row["type"] for row in result["tensors"]} == {
        n: t.type.name for n, t in written.tensors.items()
    }
    types = {row["name"]: (row["type"], row["note"]) for row in result["tensors"]}
    assert types["blk.0.ffn_up.weight"] == ("TQ2_0", "")
    assert types["blk.1.attn_v.weight"] == ("Q8_0", "--keep")
    assert types["token_embd.weight"] == ("Q8_0", "embedding")
    assert result["file_bytes"] == Path("m.gguf").stat().st_size
    assert result["num_parameters"] == sum(int(np.prod(t.shape)) for t in source.tensors.values())
    assert result["ratio_to_bf16"] == pytest.approx(result["bits_per_weight"] / 16)
    before, after = result["perplexity"]["before"], result["perplexity"]["after"]
    assert before["num_scored"] == after["num_scored"] > 100
    assert before["value"] != after["value"]
    ours, theirs = (build_tokenizer(file.tokenizer, 384) for file in (source, written))
    assert ours.encode(TEXT, add_special=True, parse_special=True) == theirs.encode(
        TEXT, add_special=True, parse_special=True
    )
    assert theirs.chat_template_text == ours.chat_template_text
    assert theirs.eog_token_ids == ours.eog_token_ids


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_gguf("s.gguf")
    lines = quantize(capsys, "s.gguf", "m.gguf", "--type", "tq1_0", "--evaluate", "text.txt").splitlines()
    assert lines[0].split() == ["tensor", "shape", "from", "type", "size", "error"]
    assert "token_embd.weight" in lines[1]
    assert "rows of 64, no multiple of 256" in next(line for line in lines if "blk.0.attn_q" in line)
    assert [line.split()[0] for line in lines[-4:]] == ["weights", "of", "file", "perplexity"]


def write_bitnet(folder: str) -> None:
    """As transformers saves BitNet: ternary weights packed four rows a byte, one scale each."""
    shape = WIDE | {"architecture": "bitnet"}
    scheme = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    write_tiny_hf(folder, config={"quantization_config": scheme}, **shape)
    tensors = {hf_name(name): array for name, array in tiny_weights(TinyShape(**shape)).items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes = np.clip(np.rint(tensors[name] / np.abs(tensors[name]).mean()), -1, 1).astype(np.int8)
        tensors |= {name: pack_uint8(codes), f"{name}_scale": np.array([0.05], np.float32)}
    save_mixed(Path(folder, "model.safetensors"), tensors)


@pytest.mark.parametrize("wanted", ["tq2_0", "tq1_0"])
def test_a_packed_bitnet_model_becomes_a_file_of_the_same_answers(
    wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bitnet("hf")
    table = quantize(capsys, "hf", "m.gguf", "--type", wanted, "--keep", "token_embd.weight=f32")
    assert wanted.upper() in table
    ids = np.arange(60, dtype=np.int32)
    found = []
    for path in ("hf", "m.gguf"):
        core = load_core(open_model(path), isa="auto", num_threads=1, num_blocks=4, max_num_seqs=1, max_batch_tokens=64)
        found.append(window_logprobs(core, ids))
    assert np.array_equal(*found)


def test_faults_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_gguf("s.gguf")
    Path("there.gguf").write_bytes(b"mine")
    Path("latin.txt").write_bytes(b"\xff")
    Path("short.txt").write_bytes(b"a")
    Path("cut.gguf").write_bytes(Path("s.gguf").read_bytes()[:-100])
    weights = tiny_weights(TinyShape())["blk.1.ffn_up.weight"]
    weights[3, 3] = np.inf
    write_tiny_hf("bad", replace={"blk.1.ffn_up.weight": weights})
    write_tiny_hf("other", config={"architectures": ["FalconForCausalLM"]})
    before = sorted(tmp_path.rglob("*"))
    types = "f32, f16, bf16, q8_0, q4_0, q4_1, tq1_0, tq2_0"
    for arguments, code, line in [
        (["s.gguf", "m.gguf"], 2, f"sterna: --type is missing: one of {types} (sterna quantize --help)"),
        (["s.gguf", "m.gguf", "--type", "q3"], 2, f"sterna: --type: no type 'q3' to write; there are {types}"),
        (["s.gguf", "m.gguf", "--type", "q8_0", "--keep", "q4_0"], 2,
         "sterna: --keep: 'q4_0' is not PATTERN=TYPE, as in token_embd.weight=q8_0"),
        (["s.gguf", "m.gguf", "--type", "q8_0", "--keep", "x*=q5_k"], 2,
         f"sterna: --keep x*: no type 'q5_k' to write; there are {types}"),
        (["s.gguf", "m.gguf", "--type", "q8_0", "--keep", "blk.9.*=q4_0"], 1,
         "sterna: s.gguf: no matrix has a name like 'blk.9.*'"),
        (["s.gguf", "there.gguf", "--type", "q8_0"], 1, "sterna: there.gguf exists already"),
        (["s.gguf", "no/m.gguf", "--type", "q8_0"], 1, "sterna: no/m.gguf: No such file or directory"),
        (["s.gguf", "m.gguf", "--type", "q8_0", "--evaluate", "no.txt"], 1,
         "sterna: --evaluate: no.txt: No such file or directory"),
        (["s.gguf", "m.gguf", "--type", "q8_0", "--evaluate", "latin.txt"], 1,
         "sterna: --evaluate: latin.txt: the text is not UTF-8"),
        (["s.gguf", "m.gguf", "--type", "q8_0", "--evaluate", "short.txt"], 1,
         "sterna: --evaluate: short.txt: 1 tokens leave nothing to predict; two are the least"),
        (["bad", "m.gguf", "--type", "q4_0"], 1, "sterna: bad: model.layers.1.mlp.up_proj.weight: "
         "it holds a value that is not finite or too large to quantize"),
    ]:  # fmt: skip
        assert fault(capsys, *arguments) == (code, line)
    assert "truncated" in fault(capsys, "cut.gguf", "m.gguf", "--type", "q8_0")[1]
    assert "['FalconForCausalLM'] is not supported" in fault(capsys, "other", "m.gguf", "--type", "q8_0")[1]
    assert sorted(tmp_path.rglob("*")) == before


def test_it_loads_no_torch() -> None:
    write_tiny_gguf("s.gguf")
    script = (
        "import sys\nfrom server import cli\n"
        "assert cli.main(['quantize', 's.gguf', 'm.gguf', '--type', 'q4_0']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_default_model(default_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(__file__).parents[2] / "data" / "texts" / "prose.txt"
    result = json.loads(quantize(capsys, DEFAULT_MODEL, "m.gguf", "--type", "q8_0", "--evaluate", str(text), "--json"))
    before, after = result["perplexity"]["before"]["value"], result["perplexity"]["after"]["value"]
    assert after == pytest.approx(before, rel=0.005)  # 4-bit values, once more at 8 bits
    assert open_model("m.gguf").config == open_model(default_model).config
