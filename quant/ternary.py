"""Ternary weights in NumPy: the two quantizers, and the packing of TQ1_0 and TQ2_0 blocks, both ways.

`absmax`: a scale for each group of consecutive weights (64, 128, 256), the largest magnitude in it; a weight becomes
round(w / scale), halves away from zero. With groups of 256 that is ggml's own rule, bit for bit (`gguf.quants`).
`absmean`: one scale for the tensor, its mean magnitude but at least 1e-5; a weight becomes round(w / scale) cut to
-1..1, halves to even: BitNet b1.58 (arXiv 2402.17764), as transformers computes it. Weights that are ternary already
(-s, 0, s) come out of `absmax` as they are; out of `absmean` with too small a scale, the share of zeros being in it.

Blocks hold 256 codes and one f16 scale, so groups of 64 and 128 are for training experiments, not for files.
Layouts: ggml-common.h, block_tq1_0 and block_tq2_0. The straight-through gradient is torch's business.
"""

import numpy as np

BLOCK = 256
GROUP_SIZES = (64, 128, 256)
MIN_ABSMEAN = np.float32(1e-5)
_SMALLEST_INVERTIBLE = np.float32(2.0**-127)  # 1/x is finite in float32 from 2^-127 on


def absmax(values: np.ndarray, group: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """float32 (..., n * group) to codes (int8, same shape, -1..1) and scales (float32, (..., n)).

    A group of zeros, or of nothing above 2^-127, has the scale that it has and codes of 0. Raises ValueError for a
    value that is not finite and a row that is no whole number of groups.
    """
    if group not in GROUP_SIZES or values.shape[-1] % group:
        raise ValueError(f"rows of {values.shape[-1]} values in groups of {group} (accepted: 64, 128 or 256, whole)")
    groups = values.reshape(*values.shape[:-1], -1, group)
    magnitude = np.abs(groups)
    scales = magnitude.max(axis=-1)
    if not np.isfinite(scales).all():
        raise ValueError("it holds a value that is not finite")
    # w * (1 / scale), not w / scale: what ggml computes, and the two differ in the last bit, so at ties.
    usable = scales >= _SMALLEST_INVERTIBLE
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    magnitude *= inverse[..., None]
    codes = (magnitude >= np.float32(0.5)).view(np.int8)  # at most 1 and a rounding error: there is no 2
    np.negative(codes, out=codes, where=groups < 0)
    return codes.reshape(values.shape), scales


def absmean_scale(total: float, count: int) -> np.float32:
    """The tensor's scale from the sum of its magnitudes, which may come slice by slice, in float64."""
    if not np.isfinite(total):
        raise ValueError("it holds a value that is not finite")
    return max(np.float32(total / count), MIN_ABSMEAN)


def absmean(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """float32 to codes (int8, -1..1) by the tensor's `scale`."""
    # Multiplied by the inverse, as transformers does.
    return np.clip(np.rint(values * (np.float32(1) / scale)), -1, 1).astype(np.int8)


def half_scales(scales: np.ndarray) -> np.ndarray:
    """Scales as blocks hold them. Rounding to f16 costs up to 2^-11 = 0.05 %, of the scale alone.

    Raises ValueError for one that f16 cannot hold.
    """
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("it holds a value that is not finite or too large to quantize")
    return halves


def pack_tq2_0(codes: np.ndarray, scales: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Codes (int8, (n, 256)) and f16 scales (n,) to blocks: uint8 (n, 66)."""
    blocks = np.empty((len(codes), 66), np.uint8) if out is None else out
    # 2 x 32 bytes of four codes each: byte i of half h has code 128h + 32j + i in its bits 2j and 2j+1.
    digits = (codes + np.int8(1)).view(np.uint8).reshape(-1, 2, 4, 32)
    packed = digits[:, :, 0] | digits[:, :, 1] << 2 | digits[:, :, 2] << 4 | digits[:, :, 3] << 6
    blocks[:, :64] = packed.reshape(-1, 64)
    blocks[:, 64:] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def unpack_tq2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (n, 66) to codes (int8, (n, 256)) and f16 scales (n,). The unused code 3 comes out as 2, as in ggml."""
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    digits = packed >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return digits.reshape(-1, 256).view(np.int8) - np.int8(1), _scales(blocks[:, 64:])


# A byte of TQ1_0 holds five digits in base 3, most significant first, as the fraction value/243 in 1/256ths, rounded
# up: multiplied by 3 modulo 256, each digit in turn is what overflows. The last 4 bytes hold four digits each.
_POWERS = np.array([81, 27, 9, 3, 1], np.uint8)
_RUNS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))  # (first code, digits a byte, bytes)


def pack_tq1_0(codes: np.ndarray, scales: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Codes (int8, (n, 256)) and f16 scales (n,) to blocks: uint8 (n, 54)."""
    blocks = np.empty((len(codes), 54), np.uint8) if out is None else out
    digits = (codes + np.int8(1)).view(np.uint8)
    at = 0
    for first, count, num_bytes in _RUNS:
        run = digits[:, first : first + count * num_bytes].reshape(-1, count, num_bytes)
        value = np.zeros((len(codes), num_bytes), np.uint16)
        for power, digit in zip(_POWERS, run.swapaxes(0, 1), strict=False):
            value += digit * power
        blocks[:, at : at + num_bytes] = (value * 256 + 242) // 243
        at += num_bytes
    blocks[:, 52:] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


def unpack_tq1_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (n, 54) to codes (int8, (n, 256)) and f16 scales (n,)."""
    codes = np.empty((len(blocks), 256), np.int8)
    at = 0
    for first, count, num_bytes in _RUNS:
        packed = blocks[:, at : at + num_bytes]
        for digit in range(count):
            turned = packed * np.uint8(3**digit)  # modulo 256
            start = first + digit * num_bytes
            codes[:, start : start + num_bytes] = (turned.astype(np.uint16) * 3 >> 8).astype(np.int8) - np.int8(1)
        at += num_bytes
    return codes, _scales(blocks[:, 52:])


def _scales(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16).reshape(-1)
