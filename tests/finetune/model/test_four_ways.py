"""One adapter version, four programs, the same logits: our trainer, `peft` over transformers, our engine, llama.cpp.

The trainer and `peft` compute in float32 and must be equal. The engine and llama.cpp (with the file that `sterna
adapters export --gguf` gives) may be off by what they are off without an adapter: an f16 KV cache, and int8 activations
on the default model. That adapter moves the logits several times as far, and so does one whose Q and K rows are in the
wrong order, so the comparison can fail. llama.cpp's part needs the peer (`make peers`), the others do not.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.model.lora import LoraSpec
from finetune.model.model import TrainModel
from finetune.model.peft import export_peft
from quant.lora_gguf import LoraPair, write_lora_gguf
from quant.model_file import ModelFile, open_model
from quant.rope_order import half_split_rows
from quant.tensor_rules import is_query_or_key
from server.adapters.gguf import lora_pairs
from server.engine.adapters import pack
from server.engine.lora import load_adapter_files
from server.engine.weights import load_core
from tests.server.engine.reference import TEXT_NAMES, core_logits, text_ids
from tests.server.text.peer import PEER_PYTHON
from tests.tiny_models import write_tiny_gguf, write_tiny_hf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's, transformers' and PEFT's own

Logits = list[np.ndarray]
"""For each text float32 (positions, vocabulary)."""

ALL_SEVEN = LoraSpec(rank=8)
PATTERNS = LoraSpec(
    rank=8,
    use_rslora=True,
    rank_pattern={"k_proj": 3, r"layers\.1\..*up_proj": 5},
    alpha_pattern={"0.self_attn.q_proj": 7.0},
)
"""Scales that one alpha cannot say: the GGUF file has a part of some in B."""
TINY: dict[str, tuple[dict[str, Any], LoraSpec]] = {
    "llama": ({}, ALL_SEVEN),
    "llama, patterns": ({"heads": 6, "kv_heads": 1, "hidden": 96}, PATTERNS),
    "qwen2": ({"architecture": "qwen2"}, ALL_SEVEN),
    "qwen3, patterns": ({"architecture": "qwen3", "head_dim": 32}, PATTERNS),
}
DEFAULT = "default model"
NUM_TOP = 10


@dataclass(frozen=True, eq=False)
class Version:
    """A version on disk, and the trainer's logits without and with it."""

    file: ModelFile
    hf_options: dict[str, Any]
    """Where transformers finds the base."""
    folder: Path
    texts: list[list[int]]
    plain: Logits
    adapted: Logits
    is_int8: bool

    def tolerance(self, plain_error: float) -> float:
        """Of `distance` with the adapter, by what it is without: other hidden states, other rounding.

        Measured: int8 0.97 to 1.03 times; float 0.0006 to 0.0014 where it is 0.0003 to 0.0009 without.
        """
        return 1.3 * plain_error if self.is_int8 else 5e-3

    @cached_property
    def pairs(self) -> list[LoraPair]:
        return lora_pairs(load_adapter_files(self.folder, self.file.config))


def train(base: Path, spec: LoraSpec, size: float, texts: list[list[int]], folder: Path) -> tuple[Logits, Logits]:
    """A random version at `folder`; the trainer's logits without and with it.

    Q and K get four times as much: alone they would move the logits no further than int8 does.
    """
    model = TrainModel.open(base, spec, dtype=torch.float32)

    def logits() -> Logits:
        return [model.logits(ids, range(len(ids))).numpy() for ids in texts]

    plain = logits()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, factor in model.parameters().items():
            if ".lora_B." in name:
                strength = 4 if "q_proj" in name or "k_proj" in name else 1
                factor.copy_(strength * size * torch.randn(factor.shape, generator=generator))
    export_peft(model, folder)
    return plain, logits()


@pytest.fixture(
    scope="module",
    params=[  # a version's three tests in one worker: it is made once
        *(pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TINY),
        pytest.param(DEFAULT, marks=[pytest.mark.real_model, pytest.mark.xdist_group(DEFAULT)]),
    ],
)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Version]:
    folder, is_default = tmp_path_factory.mktemp("version"), request.param == DEFAULT
    if is_default:
        base: Path = request.getfixturevalue("default_model")
        spec, size = ALL_SEVEN, 0.02
        file = open_model(base)
        hf_options: dict[str, Any] = {
            "pretrained_model_name_or_path": base.parent, "gguf_file": base.name
        }  # fmt: skip
        texts = [text_ids(file, name)[:64].tolist() for name in TEXT_NAMES]
    else:
        shape, spec = TINY[request.param]
        base, size = write_tiny_gguf(folder / "base.gguf", **shape), 0.1
        file = open_model(base)
        hf_options = {"pretrained_model_name_or_path": write_tiny_hf(folder / "hf", **shape)}
        texts = [np.random.default_rng(seed).integers(0, 384, 40).tolist() for seed in range(3)]
    plain, adapted = train(base, spec, size, texts, folder / "peft")
    yield Version(file, hf_options, folder / "peft", texts, plain, adapted, is_default)
    file.close()


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def distance(got: Logits, expected: Logits) -> float:
    """The mean difference of the log-probabilities of the ten tokens that are expected most."""
    differences = []
    for one, other in zip(got, expected, strict=True):
        mine, theirs = log_probabilities(one), log_probabilities(other)
        top = np.argpartition(-theirs, NUM_TOP, axis=1)[:, :NUM_TOP]
        differences.append(np.abs(np.take_along_axis(mine - theirs, top, 1)))
    return float(np.concatenate(differences).mean())


def agreement(got: Logits, expected: Logits) -> float:
    """The share of positions with the same most likely token."""
    return float(np.mean(np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(got, expected, strict=True)])))


def check(version: Version, plain: Logits, adapted: Logits) -> float:
    """Another program's logits without and with the version. Gives the tolerance."""
    plain_error, error = distance(plain, version.plain), distance(adapted, version.adapted)
    assert plain_error < (0.15 if version.is_int8 else 2e-3)  # measured: 0.08 to 0.09, and 0.0003 to 0.0009
    tolerance = version.tolerance(plain_error)
    assert error < tolerance
    assert distance(version.plain, version.adapted) > 3 * tolerance  # what the adapter does
    assert agreement(adapted, version.adapted) > (0.9 if version.is_int8 else 0.97)
    return tolerance


def test_peft(version: Version) -> None:
    pytest.importorskip("peft", reason="test extra")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(model: Callable[..., Any]) -> Logits:
        with torch.no_grad():
            return [model(torch.tensor([ids])).logits[0].numpy() for ids in version.texts]

    base = AutoModelForCausalLM.from_pretrained(
        **version.hf_options, dtype=torch.float32, attn_implementation="eager"
    )  # fmt: skip
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, version.folder))
    for got, expected in ((plain, version.plain), (adapted, version.adapted)):
        for one, other in zip(got, expected, strict=True):
            # Sums of float32 in another order, over up to 30 layers: measured up to 5e-5 of the spread.
            assert np.abs(one - other).max() < 3e-4 * other.std()


def test_engine(version: Version) -> None:
    core = load_core(version.file, isa="auto", num_threads=1, num_blocks=8, max_num_seqs=1, max_batch_tokens=64)
    core.set_lora(2, pack(core, load_adapter_files(version.folder, version.file.config)))

    def logits(slot: int) -> Logits:
        return [
            np.concatenate(list(core_logits(core, np.array(ids, np.int32), lora_slot=slot))) for ids in version.texts
        ]

    check(version, logits(-1), logits(2))


@pytest.mark.real_peer
def test_llamacpp(version: Version, tmp_path: Path) -> None:
    files = {"right": tmp_path / "right.gguf", "wrong": tmp_path / "wrong.gguf"}
    write_lora_gguf(files["right"], version.file.config, version.pairs, {})
    write_lora_gguf(files["wrong"], version.file.config, [in_other_order(version, one) for one in version.pairs], {})
    plain, adapted, other = llamacpp_logits(version, [None, files["right"], files["wrong"]], tmp_path / "logits.npz")
    tolerance = check(version, plain, adapted)
    assert distance(other, version.adapted) > 3 * tolerance


def in_other_order(version: Version, pair: LoraPair) -> LoraPair:
    """So that the file has the rows of B for Q and K as they were for llama, and not as they were for Qwen."""
    if not is_query_or_key(pair.tensor):
        return pair
    rows = half_split_rows(version.file.config, len(pair.b) // version.file.config.head_dim)
    return LoraPair(pair.tensor, pair.a, pair.b[rows], pair.scale)


def llamacpp_logits(version: Version, loras: list[Path | None], output: Path) -> list[Logits]:
    request = {
        "model": str(version.file.path),
        "loras": [None if path is None else str(path) for path in loras],
        "texts": version.texts,
        "output": str(output),
    }
    command = [PEER_PYTHON, str(Path(__file__).with_name("llamacpp_logits_peer.py"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(output) as found:
        return [[found[f"{i}/{j}"] for j in range(len(version.texts))] for i in range(len(loras))]
