"""Block-sparse attention agrees with a dense masked softmax: one sequence, several, shared prefixes, long tiles."""

import pytest
import torch

import finetune.ops.attention_tiles as attention_tiles
from finetune.ops.attention import Layout, attend
from finetune.ops.attention_tiles import make_tiles
from finetune.ops.rope import rope_angles
from finetune.packed import Segment

FORESTS: dict[str, tuple[Segment, ...]] = {
    "one": (Segment(0, 9, -1),),
    "two": (Segment(0, 5, -1), Segment(5, 9, -1)),
    "branches": (Segment(0, 4, -1), Segment(4, 7, 0), Segment(7, 9, 0)),
    "tree": (Segment(0, 3, -1), Segment(3, 5, 0), Segment(5, 6, 1), Segment(6, 8, 1), Segment(8, 9, 0)),
    "apart": (Segment(0, 2, -1), Segment(2, 4, -1), Segment(4, 6, 0), Segment(6, 9, 1)),
}
HEADS, KV_HEADS, D = 4, 2, 4


def visible(segments: tuple[Segment, ...]) -> torch.Tensor:
    """bool (T, T), by asking for each pair of rows."""
    owner = [i for i, s in enumerate(segments) for _ in range(s.start, s.end)]
    ancestors = [{i} for i in range(len(segments))]
    for i, segment in enumerate(segments):
        if segment.parent >= 0:
            ancestors[i] |= ancestors[segment.parent]
    rows = range(len(owner))
    return torch.tensor([[owner[k] in ancestors[owner[q]] and k <= q for k in rows] for q in rows])


def layout_of(
    segments: tuple[Segment, ...],
    dtype: torch.dtype = torch.float64,
    rope_dim: int = D,
    scores: torch.dtype | None = None,
) -> Layout:
    positions = torch.arange(segments[-1].end) % 7
    angles = rope_angles(positions, theta=100.0, rope_dim=rope_dim, factors=None, dtype=dtype)
    return Layout(make_tiles(segments, HEADS), *angles, scores or dtype)


def turn(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Out of place, by the definition."""
    cos, sin = layout.cos[:, None], layout.sin[:, None]
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, layout: Layout) -> torch.Tensor:
    q, k = turn(q, layout), turn(k, layout)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def inputs(num_rows: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(num_rows, HEADS, D), (num_rows, KV_HEADS, D), (num_rows, KV_HEADS, D)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def check(segments: tuple[Segment, ...], dtype: torch.dtype = torch.float64, rope_dim: int = D) -> None:
    qkv, layout = inputs(segments[-1].end, dtype), layout_of(segments, dtype, rope_dim)
    out, expected = attend(*qkv, layout), slow(*qkv, visible(segments), layout)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for own, other in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("forest", FORESTS)
def test_equals_a_dense_mask(forest: str) -> None:
    check(FORESTS[forest])


def test_a_head_that_turns_in_part() -> None:
    check(FORESTS["tree"], rope_dim=2)


@pytest.mark.parametrize("forest", FORESTS)
def test_small_tiles(forest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "MAX_QUERIES", 2)
    check(FORESTS[forest])


def test_a_long_sequence() -> None:
    check((Segment(0, 300, -1), Segment(300, 450, 0)), torch.float32)


@pytest.mark.parametrize("forest", FORESTS)
def test_gradcheck(forest: str) -> None:
    layout = layout_of(FORESTS[forest])
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, layout), inputs(9))


@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16])
def test_bfloat16(scores: torch.dtype) -> None:
    segments = (Segment(0, 200, -1), Segment(200, 260, 0))
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in inputs(260))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = attend(q, k, v, layout_of(segments, torch.float32, scores=scores))
    expected = slow(*exact, visible(segments), layout_of(segments))
    torch.testing.assert_close(out.double(), expected, rtol=2**-6, atol=2**-7)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    for own, other in zip(grads, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert (own - other).norm() < 0.02 * other.norm()


def test_tiles_bound_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "MAX_SCORES", 1 << 16)
    segments = (Segment(0, 3000, -1), Segment(3000, 3500, 0), Segment(3500, 3700, 0))
    tiles = make_tiles(segments, HEADS)
    assert [tile.start for tile in tiles[1:]] == [tile.end for tile in tiles[:-1]]
    assert (tiles[0].start, tiles[-1].end) == (0, 3700)
    assert all(HEADS * tile.num_keys * (tile.end - tile.start) <= 1 << 16 for tile in tiles)
    assert tiles[-1].runs == ((0, 3000), (3500, 3700))
