"""What the fastest CPU engine must reach: ratios to peers and shares of the machine's limits, as the tables show them.

From the issue "The fastest CPU engine for ternary and 4-bit models": two threads, AVX-512 VNNI, medians, one run.
"""

LLAMA_CPP = {
    "smollm2-135m-instruct": {"prefill": 7.0, "decode_b1": 2.0, "decode_b8": 4.5, "decode_b32": 6.0},
    "nano": {"prefill": 3.4, "decode_b1": 1.7, "decode_b8": 3.5, "decode_b32": 3.2},
    "2b": {"prefill": 3.0, "decode_b1": 1.55, "decode_b8": 3.2, "decode_b32": 3.0},
}
IK_LLAMA_CPP = {
    "smollm2-135m-instruct": {"prefill": 1.8, "decode_b1": 1.45, "decode_b8": 2.4, "decode_b32": 3.3},
    "nano": {"prefill": 1.6, "decode_b1": 1.2, "decode_b8": 2.4, "decode_b32": 2.7},
    "2b": {"prefill": 1.15, "decode_b1": 1.0, "decode_b8": 1.45, "decode_b32": 1.35},
}
AVX2_LLAMA_CPP = {"prefill": 1.0, "decode_b1": 1.0, "decode_b8": 1.0, "decode_b32": 1.0}
"""Both with AVX2: ahead."""
VLLM_STREAMS = {1: 6.0, 8: 4.0, 32: 3.0}

LONG_PREFILL_KEPT = {"smollm2-135m-instruct": 0.45, "nano": 0.45, "2b": 0.70}
"""Of the 512-token prefill rate, at 4,096 tokens of context."""
BATCH_32_OF_VNNI = 0.55
"""Of int8 peak / multiply-adds of a token."""
DECODE_OF_BANDWIDTH = {"2b": 0.92}
"""Of memory bandwidth / bytes of the tensors that a step reads, at batch 1."""
LORA_KEPT = 0.85
"""Of decode throughput at batch 32, with 8 versions of rank 16 mixed."""
LORA_UNUSED_KEPT = 0.98
"""Nothing is the target; 2 % is what two medians of one run differ by anyway."""

GEMV_GOPS = {1: 150.0, 2: 300.0}
"""Ternary, weights in cache, by threads; an operation is half a multiply-add."""
GEMM_OF_VNNI = 0.75
"""Prefill on the shapes of `2b`."""
