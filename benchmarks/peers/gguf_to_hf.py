"""A llama GGUF file as a Hugging Face directory in bf16, for vLLM, which reads no GGUF on CPU any more.

transformers reads the file and dequantizes it, but refuses to save what it made of it; a fresh model of the same
configuration takes the values over. The tokenizer loses `tokenizer.ggml.pre`, which changes how digits are cut: speed
does not depend on it.

usage: gguf_to_hf.py MODEL.gguf OUT    (run by benchmarks/http_streams.py; needs torch, transformers, accelerate, gguf)
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

source, out = Path(sys.argv[1]), Path(sys.argv[2])
read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
config = read.config
config.dtype = torch.bfloat16
if hasattr(config, "quantization_config"):
    del config.quantization_config
fresh = LlamaForCausalLM(config).to(torch.bfloat16)
fresh.load_state_dict(read.state_dict())
AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
fresh.save_pretrained(out)
