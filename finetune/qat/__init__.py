"""Quantization-aware training: ternary models whose exported file gives the logits that were trained."""
