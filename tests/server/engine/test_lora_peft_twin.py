"""What PEFT saves, this loader reads as PEFT means it: same matrices, ranks and scales, for every kind of targeting."""

from pathlib import Path

import numpy as np
import pytest

from server.engine.lora import load_adapter_files
from tests.server.engine.test_lora_files import small_model

MODEL = small_model(num_layers=3, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=4)
VARIANTS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "all linear but": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.[02]\.(self_attn|mlp)\.(k|up)_proj"},
    "full names": {"target_modules": ["model.layers.2.mlp.gate_proj", "1.self_attn.v_proj"]},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["o_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 8, r"layers\.2\..*up_proj": 1, "proj": 5},
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.v_proj": 32, "1.mlp.up_proj": 2},
    },
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_peft(tmp_path: Path, variant: str, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="test extra")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.intermediate_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.num_kv_heads,
        )
    ).to(getattr(torch, dtype))
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **VARIANTS[variant])
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.save_pretrained(tmp_path)

    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    weights = load_adapter_files(tmp_path, MODEL)
    assert len(weights.projections) == len(theirs) > 0
    for part in weights.projections:
        block = "mlp" if part.projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        module = theirs[f"model.layers.{part.layer}.{block}.{part.projection}"]
        np.testing.assert_array_equal(part.a, module.lora_A["default"].weight.detach().float().numpy())
        np.testing.assert_array_equal(part.b, module.lora_B["default"].weight.detach().float().numpy())
        assert part.scale == pytest.approx(module.scaling["default"])
