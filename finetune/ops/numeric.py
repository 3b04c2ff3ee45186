"""Which types the sensitive parts are computed in."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16 and float32, float64 for itself: sums, norms, softmax, losses."""
    return torch.promote_types(dtype, torch.float32)
