"""A run's learning curve as SVG: losses and held-out accuracy by step, the rate, and where stages begin.

Plain functions from lines to text; nothing here measures.
"""

import math
from collections.abc import Sequence

from finetune.qat.metrics import Line
from finetune.svg import frame, line, page, text

WIDTH, HEIGHT = 960, 420
_LEFT, _TOP, _PANEL, _TALL = 60, 50, 380, 300
_COLOURS = {"train": "#9aa5b1", "held out": "#2a7f62", "accuracy": "#3d6fb4", "entropy": "#e0a458"}
_NUM_POINTS = 400
"""A curve of more is no clearer, only larger."""


def picture(lines: Sequence[Line], title: str) -> str:
    """`lines` in order; stages follow each other."""
    steps = _steps(lines)
    thin = max(1, len(lines) // _NUM_POINTS)
    losses = [(at, one.loss) for at, one in zip(steps, lines, strict=True)][::thin]
    held = [(at, one.held_out_loss) for at, one in zip(steps, lines, strict=True) if one.held_out_loss is not None]
    right = [
        (at, one.held_out_accuracy) for at, one in zip(steps, lines, strict=True) if one.held_out_accuracy is not None
    ]
    entropy = [(at, one.entropy) for at, one in zip(steps, lines, strict=True)][::thin]
    last = steps[-1] if steps else 1
    top = max([loss for _, loss in losses + held + entropy if math.isfinite(loss)], default=1.0)
    parts = [text(_LEFT, 22, title, size=15)]
    parts += _panel(_LEFT, "Loss by step (nats a token)", f"{top:.2f}", last)
    for name, curve in (("entropy", entropy), ("train", losses), ("held out", held)):
        parts += _curve(curve, _LEFT, last, top, _COLOURS[name])
    other = _LEFT + _PANEL + 100
    parts += _panel(other, "Held-out tokens that are the most likely one", "100 %", last)
    parts += _curve(right, other, last, 1.0, _COLOURS["accuracy"])
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 110 * number
        parts += [line([(x, HEIGHT - 16), (x + 18, HEIGHT - 16)], colour, 3), text(x + 24, HEIGHT - 12, name)]
    for at, stage in _stages(lines, steps):
        begin = _LEFT + _PANEL * at / last
        parts += [line([(begin, _TOP), (begin, _TOP + _TALL)], "#ccc", 1), text(begin + 4, _TOP + 12, stage, size=10)]
    return page(WIDTH, HEIGHT, parts)


def _steps(lines: Sequence[Line]) -> list[int]:
    """Of the whole run: each stage counts from 1."""
    found: list[int] = []
    base = 0
    for number, one in enumerate(lines):
        if number and one.stage != lines[number - 1].stage:
            base = found[-1]
        found.append(base + one.step)
    return found


def _stages(lines: Sequence[Line], steps: Sequence[int]) -> list[tuple[int, str]]:
    found = []
    for number, one in enumerate(lines):
        if one.stage and (not number or one.stage != lines[number - 1].stage):
            found.append((steps[number - 1] if number else 0, one.stage))
    return found


def _panel(x: float, title: str, top: str, last: int) -> list[str]:
    return [
        text(x, _TOP - 10, title, size=13),
        *frame(x, _TOP, _PANEL, _TALL),
        text(x - 6, _TOP + 10, top, anchor="end"),
        text(x - 6, _TOP + _TALL, "0", anchor="end"),
        text(x + _PANEL, _TOP + _TALL + 16, f"{last:,}", anchor="end"),
    ]


def _curve(points: Sequence[tuple[int, float]], x: float, last: int, top: float, colour: str) -> list[str]:
    drawn = [
        (x + _PANEL * at / last, _TOP + _TALL * (1 - min(value, top) / top))
        for at, value in points
        if math.isfinite(value)
    ]
    return [line(drawn, colour, 1.8)] if drawn else []
