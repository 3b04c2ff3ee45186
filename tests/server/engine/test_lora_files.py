"""PEFT directories: what is honoured equals PEFT's own arithmetic, and everything else is refused by name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.model_types import ModelConfig
from server.engine.lora import load_adapter_files
from server.engine.lora_types import PROJECTIONS
from server.errors import AdapterError


def small_model(
    num_layers=3, hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, head_dim=3, architecture="qwen2"
) -> ModelConfig:
    """The sizes that a loader of adapters reads; the rest is anything."""
    return ModelConfig(
        architecture=architecture,
        name="small",
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=16,
        context_length=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_dim=head_dim,
        rope_freq_factors=None,
        qkv_bias=architecture == "qwen2",
        qk_norm=False,
        tie_embeddings=True,
    )


MODEL = small_model()
BASE_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj"],
}


def module_name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if projection[0] in 'qkvo' else 'mlp'}.{projection}"


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (values, dtype) in tensors.items():
        data = encode(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def tensors_for(modules, ranks=None, dtype="F32", model=MODEL) -> dict[str, tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    result = {}
    for layer, projection in modules:
        rank = (ranks or {}).get((layer, projection), 2)
        rows, columns = model.projection_shape(projection)
        prefix = f"base_model.model.{module_name(layer, projection)}"
        # Multiples of 1/8: exact in every type.
        result[f"{prefix}.lora_A.weight"] = (rng.integers(-8, 8, (rank, columns)) / 8, dtype)
        result[f"{prefix}.lora_B.weight"] = (rng.integers(-8, 8, (rows, rank)) / 8, dtype)
    return result


def write_adapter(path: Path, config: dict, tensors) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


def everywhere(*projections: str) -> list[tuple[int, str]]:
    return [(layer, projection) for layer in range(MODEL.num_layers) for projection in projections]


def load(path, **changes):
    tensors = changes.pop("tensors", tensors_for(everywhere("q_proj", "v_proj")))
    return load_adapter_files(write_adapter(path, BASE_CONFIG | changes, tensors), MODEL)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_float_type(tmp_path, dtype):
    tensors = tensors_for(everywhere(*PROJECTIONS), dtype=dtype)
    weights = load(tmp_path, target_modules=list(PROJECTIONS), tensors=tensors)
    assert weights.rank == 2
    assert [(part.layer, part.projection) for part in weights.projections] == everywhere(*PROJECTIONS)
    for part in weights.projections:
        prefix = f"base_model.model.{module_name(part.layer, part.projection)}"
        rows, columns = MODEL.projection_shape(part.projection)
        assert part.a.shape == (2, columns)
        assert part.b.shape == (rows, 2)
        assert part.a.dtype == part.b.dtype == np.float32
        assert part.a.flags.c_contiguous
        assert part.a.flags.writeable  # its own memory, not the file
        np.testing.assert_array_equal(part.a, tensors[f"{prefix}.lora_A.weight"][0])
        np.testing.assert_array_equal(part.b, tensors[f"{prefix}.lora_B.weight"][0])
        assert part.scale == 3.0


def test_the_digest_covers_both_files(tmp_path):
    first = load(tmp_path / "a")
    assert first.digest == load(tmp_path / "b").digest
    assert first.digest.startswith("sha256:")
    assert len(first.digest) == 7 + 64
    assert load(tmp_path / "c", lora_alpha=7).digest != first.digest
    tensors = tensors_for(everywhere("q_proj", "v_proj"))
    name = next(iter(tensors))
    tensors[name] = (tensors[name][0] + 1, "F32")
    assert load(tmp_path / "d", tensors=tensors).digest != first.digest


def test_patterns_and_rslora(tmp_path):
    ranks = {(1, "q_proj"): 4, (0, "v_proj"): 1, (1, "v_proj"): 1, (2, "v_proj"): 1}
    weights = load(
        tmp_path,
        use_rslora=True,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 4, "v_proj": 1},
        alpha_pattern={r"^model\.layers\.2\..*q_proj": 10.5, "proj": 99},  # "proj" is no whole name: no match
        tensors=tensors_for(everywhere("q_proj", "v_proj"), ranks),
    )
    scales = {(part.layer, part.projection): part.scale for part in weights.projections}
    assert weights.rank == 4
    assert scales == pytest.approx(
        {
            (0, "q_proj"): 6 / math.sqrt(2),
            (1, "q_proj"): 6 / math.sqrt(4),
            (2, "q_proj"): 10.5 / math.sqrt(2),
            (0, "v_proj"): 6.0,
            (1, "v_proj"): 6.0,
            (2, "v_proj"): 6.0,
        }
    )


@pytest.mark.parametrize(
    ("changes", "modules"),
    [
        ({"target_modules": "all-linear"}, everywhere(*PROJECTIONS)),
        ({"target_modules": "All-Linear", "exclude_modules": ["mlp.up_proj", "q_proj"]},
         everywhere("k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")),
        ({"target_modules": r".*\.(q|k)_proj"}, everywhere("q_proj", "k_proj")),
        ({"target_modules": r".*\.[12]\..*down_proj"}, [(1, "down_proj"), (2, "down_proj")]),
        ({"target_modules": ["model.layers.1.mlp.up_proj", "0.self_attn.o_proj", "unheard_of"]},
         [(0, "o_proj"), (1, "up_proj")]),
        ({"target_modules": ["o_proj"], "exclude_modules": r".*\.1\..*"}, [(0, "o_proj"), (2, "o_proj")]),
        ({"target_modules": ["o_proj"], "layers_to_transform": 2}, [(2, "o_proj")]),
        ({"target_modules": ["o_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
         [(0, "o_proj"), (2, "o_proj")]),
        ({"target_modules": ["o_proj", "model.layers.1.self_attn.o_proj"], "layers_to_transform": [0]},
         [(0, "o_proj"), (1, "o_proj")]),
        ({"target_modules": ["o_proj"], "layers_to_transform": []}, everywhere("o_proj")),
    ],
)  # fmt: skip
def test_targets(tmp_path, changes, modules):
    weights = load(tmp_path, tensors=tensors_for(modules), **changes)
    assert {(part.layer, part.projection) for part in weights.projections} == set(modules)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"key_of_tomorrow": "on"}, "key_of_tomorrow"),
        ({"key_of_tomorrow": 3}, "key_of_tomorrow"),
        ({"peft_type": "ADALORA"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": 0}, "r is 0"),
        ({"r": 65}, "r is 65"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 65}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 4}}, "regular expression"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": 5}, "target_modules"),
        ({"target_modules": [5]}, "target_modules"),
        ({"target_modules": "(q_proj"}, "regular expression"),
        ({"target_modules": ["c_attn"]}, "matches nothing"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": r".*"}, "lm_head"),
        ({"target_modules": r".*q_proj", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
    ],
)  # fmt: skip
def test_unsupported_configurations_are_named(tmp_path, changes, named):
    with pytest.raises(AdapterError) as caught:
        load(tmp_path, **changes)
    assert named in str(caught.value)


def test_everything_that_peft_writes_by_default_is_accepted(tmp_path):
    """The keys of PEFT 0.21.2's LoraConfig with their defaults."""
    defaults = {
        "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "peft_version": "0.21.2", "revision": None,
        "base_model_name_or_path": "some/where", "inference_mode": True, "exclude_modules": None, "lora_dropout": 0.1,
        "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "modules_to_save": None,
        "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {},
        "trainable_token_indices": None, "eva_config": None, "corda_config": None, "lora_ga_config": None,
        "use_dora": False, "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
        "qalora_group_size": 16, "monteclora_config": None, "layer_replication": None, "lora_bias": False,
        "target_parameters": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
        "ensure_weight_tying": False,
    }  # fmt: skip
    assert len(load(tmp_path, **defaults).projections) == 6


def first(tensors, half="A"):
    return next(name for name in tensors if f"lora_{half}" in name)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def refused(reason: str, change) -> None:
        tensors = tensors_for(everywhere("q_proj", "v_proj"))
        change(tensors)
        with pytest.raises(AdapterError, match=reason):
            load(tmp_path, tensors=tensors)

    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    refused("lora_B.weight is missing", lambda t: t.pop(first(t, "B")))
    refused("lora_A.weight is missing", lambda t: t.pop(first(t, "A")))
    refused("not expected", lambda t: t.update({f"{prefix}.lora_magnitude_vector": (np.ones(2), "F32")}))
    refused("k_proj.*not expected", lambda t: t.update(tensors_for([(0, "k_proj")])))
    refused(
        "embed_tokens.*not expected",
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": (np.ones(2), "F32")}),
    )
    refused(r"shape \[2, 9\].*need \[2, 8\]", lambda t: t.update({first(t): (np.ones((2, 9)), "F32")}))
    refused(r"shape \[3, 8\]", lambda t: t.update({first(t): (np.ones((3, 8)), "F32")}))
    refused("not finite", lambda t: t.update({first(t): (np.full((2, 8), np.nan), "BF16")}))
    refused("not finite", lambda t: t.update({first(t): (np.full((2, 8), np.inf), "F16")}))
    refused("F64.*not supported", lambda t: t.update({first(t): (np.ones((2, 8)), "F64")}))


def test_missing_files_and_pickles(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config\.json: No such file"):
        load_adapter_files(tmp_path, MODEL)
    load(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter_files(tmp_path, MODEL)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match="No such file"):
        load_adapter_files(tmp_path, MODEL)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": ' + "[" * 100_000, "\udcff"])
def test_broken_configurations(tmp_path, text):
    load(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_adapter_files(tmp_path, MODEL)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_tensor_files_never_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("adapter")
    intact = load(path)
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        weights = load_adapter_files(path, MODEL)
    except AdapterError:
        return
    assert len(weights.projections) == len(intact.projections)
    assert all(np.isfinite(part.a).all() and np.isfinite(part.b).all() for part in weights.projections)


def test_a_bitnet_model_takes_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a bitnet model cannot serve adapters"):
        load_adapter_files(tmp_path, small_model(architecture="bitnet"))
