"""The demonstration's picture as SVG: scores before and after, the training loss, the swap.

Three panels of rectangles, lines and text (finetune/svg.py). Plain functions from data to text; nothing here measures.
"""

from collections.abc import Sequence

from finetune.demo.live import Answered
from finetune.demo.results import GROUPS, METRICS, Row
from finetune.gate.intervals import Estimate
from finetune.gate.metrics import ALL, BALANCED, NO_CALL, SEEN, UNSEEN
from finetune.svg import box, frame, line, page, text

WIDTH, HEIGHT = 960, 640
_SHOWN = [(ALL, "exactly_right"), (SEEN, "exactly_right"), (UNSEEN, "exactly_right")]
_SHOWN += [(ALL, "right_tool"), (ALL, NO_CALL), (ALL, BALANCED)]
_COLOURS = {"before": "#9aa5b1", "plain recipe": "#e0a458", "after": "#2a7f62"}
_OTHERS = ("#9aa5b1", "#2a7f62", "#3d6fb4", "#a44a3f")
"""Of who answers in the swap's panel: the base first."""


def picture(
    rows: Sequence[Row],
    losses: Sequence[tuple[float, float]],
    answered: Sequence[Answered],
    events: Sequence[tuple[float, str]],
) -> str:
    """`losses`: (step, loss)."""
    return page(
        WIDTH,
        HEIGHT,
        [
            *_scores(rows, 60, 50, 870, 230),
            *_losses(losses, 60, 380, 360, 200),
            *_swap(answered, events, 510, 380, 420, 200),
        ],
    )


def _scores(rows: Sequence[Row], x: float, y: float, width: float, height: float) -> list[str]:
    found = {(row.group, row.metric): row for row in rows}
    shown = [found[key] for key in _SHOWN if key in found]
    parts = [text(x, y - 22, "The untouched third, with 95 % intervals", size=15), *_percent_axis(x, y, width, height)]
    for number, (name, colour) in enumerate(_COLOURS.items()):
        parts += [box(x + 560 + 110 * number, y - 32, 12, 12, colour), text(x + 577 + 110 * number, y - 22, name)]
    step = width / max(len(shown), 1)
    for number, row in enumerate(shown):
        left = x + step * number
        for place, estimate in enumerate((row.before, row.plain, row.after)):
            colour = list(_COLOURS.values())[place]
            parts += _bar(estimate, left + step * (0.14 + 0.25 * place), step * 0.22, y, height, colour)
        middle = left + step / 2
        parts.append(text(middle, y + height + 16, METRICS[row.metric], anchor="middle"))
        parts.append(text(middle, y + height + 31, GROUPS[row.group], anchor="middle", colour="#667"))
    return parts


def _bar(estimate: Estimate | None, x: float, width: float, y: float, height: float, colour: str) -> list[str]:
    if estimate is None or estimate.value is None:
        return []
    top = y + height * (1 - estimate.value)
    parts = [box(x, top, width, y + height - top, colour)]
    if estimate.lower is not None and estimate.upper is not None:
        ends = [y + height * (1 - end) for end in (estimate.lower, estimate.upper)]
        parts.append(line([(x + width / 2, ends[0]), (x + width / 2, ends[1])], "#222", 1.5))
        top = min(top, ends[1])
    parts.append(text(x + width / 2, top - 4, f"{100 * estimate.value:.0f}", anchor="middle", size=11))
    return parts


def _losses(losses: Sequence[tuple[float, float]], x: float, y: float, width: float, height: float) -> list[str]:
    parts = [text(x, y - 22, "Training loss by step", size=15), *frame(x, y, width, height)]
    if not losses:
        return parts
    most, last = max(loss for _, loss in losses), max(step for step, _ in losses)
    points = [(x + width * step / last, y + height * (1 - loss / most)) for step, loss in losses]
    parts += [line(points, _COLOURS["after"], 1.5), text(x - 6, y + 10, f"{most:.2f}", anchor="end")]
    parts += [
        text(x - 6, y + height, "0", anchor="end"),
        text(x + width, y + height + 16, f"{last:.0f}", anchor="end"),
    ]
    return parts


def _swap(
    answered: Sequence[Answered],
    events: Sequence[tuple[float, str]],
    x: float,
    y: float,
    width: float,
    height: float,
) -> list[str]:
    """Answers of every interval, stacked by who gave them; what happened as upright lines."""
    num_failed = sum(one.fault is not None for one in answered)
    title = f"The swap under traffic: {len(answered)} answers, {num_failed} failed"
    parts = [text(x, y - 22, title, size=15), *frame(x, y, width, height)]
    if not answered:
        return parts
    end, num_columns = max(one.at_seconds for one in answered), 60
    versions = sorted({one.version for one in answered}, key=lambda name: ("@" in name, name))
    columns = [[0] * len(versions) for _ in range(num_columns)]
    for one in answered:
        columns[min(int(one.at_seconds / end * num_columns), num_columns - 1)][versions.index(one.version)] += 1
    most = max(sum(column) for column in columns)
    for number, column in enumerate(columns):
        bottom = y + height
        for place, count in enumerate(column):
            tall = height * count / most
            bottom -= tall
            parts.append(
                box(x + width * number / num_columns, bottom, width / num_columns - 1, tall, _OTHERS[place % 4])
            )
    for place, version in enumerate(versions):
        parts += [box(x + 110 * place, y + height + 24, 12, 12, _OTHERS[place % 4])]
        parts += [text(x + 110 * place + 17, y + height + 34, version)]
    for seconds, what in events:
        at = x + width * min(seconds / end, 1.0)
        parts += [line([(at, y), (at, y + height)], "#222", 1), text(at + 4, y + 11, what, size=10)]
    parts.append(text(x + width, y + height + 16, f"{end:.0f} s", anchor="end"))
    return parts


def _percent_axis(x: float, y: float, width: float, height: float) -> list[str]:
    parts = frame(x, y, width, height)
    for percent in range(0, 101, 20):
        at = y + height * (1 - percent / 100)
        parts += [line([(x, at), (x + width, at)], "#e4e7eb", 1), text(x - 6, at + 4, f"{percent} %", anchor="end")]
    return parts
