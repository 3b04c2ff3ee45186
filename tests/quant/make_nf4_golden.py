"""Makes tests/data/nf4_golden.safetensors: weights as bitsandbytes quantizes them to NF4, and as it dequantizes them.

    python -m tests.quant.make_nf4_golden

Needs torch and bitsandbytes (0.50.2 was used, on a CPU), which no extra installs; the tests read the file alone.
"""

from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "data" / "nf4_golden.safetensors"
CASES = {  # dtype, rows, columns, block, double quantization
    "double_bf16": (torch.bfloat16, 96, 192, 64, True),
    "double_f16": (torch.float16, 8, 192, 64, True),
    "double_f32": (torch.float32, 8, 256, 128, True),
    "plain_f32": (torch.float32, 8, 192, 64, False),
    "odd": (torch.float32, 7, 33, 64, True),
}


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, (dtype, rows, columns, block, is_double) in CASES.items():
        weights = torch.randn(rows, columns) * 0.02
        weights[0, : min(block, columns)] = 0
        codes, state = functional.quantize_4bit(
            weights.to(dtype), blocksize=block, compress_statistics=is_double, quant_type="nf4"
        )
        tensors[f"{name}.weight"] = codes
        tensors |= {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        tensors[f"{name}.expected"] = functional.dequantize_4bit(codes, state)
        if not is_double:
            tensors[f"{name}.source"] = weights
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    main()
