"""What must hold beside the test: absolute floors while there is no live version, relative margins against it later.

All are reported, those that bind decide. They compare point estimates: a bound on 25 to 100 traces would refuse most
versions that keep them (true no-call 85 %, 50 traces: the lower 95 % bound lies over 80 % in 11 % of gates).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.gate.metrics import ALL, NO_CALL, Compared
from finetune.gate.results import RegressionScore
from finetune.gate.settings import GateSettings


@dataclass(frozen=True, slots=True)
class Guard:
    name: str
    value: float | None
    limit: float
    is_upper: bool
    """The value may not lie above (False: below) the limit."""
    is_binding: bool
    is_kept: bool


def guards_of(
    scores: Sequence[Compared],
    regression: tuple[RegressionScore, RegressionScore] | None,
    has_live: bool,
    settings: GateSettings,
) -> tuple[Guard, ...]:
    rows = {row.metric: row for row in scores if row.group == ALL}
    floors = ((NO_CALL, settings.min_no_call), ("well_formed", settings.min_well_formed))
    drops = ((NO_CALL, settings.max_no_call_drop), ("well_formed", settings.max_well_formed_drop))
    guards = [_guard(name, rows[name].candidate.value, floor, is_binding=not has_live) for name, floor in floors]
    guards += [
        _guard(f"{name}, change", rows[name].difference.value, -drop, is_binding=has_live) for name, drop in drops
    ]
    if regression is not None:
        ours, theirs = regression
        rise = ours.perplexity / theirs.perplexity - 1
        drop = ours.format_share - theirs.format_share
        guards += [
            _guard("perplexity, rise", rise, settings.max_perplexity_rise, is_upper=True, is_binding=has_live),
            _guard("format, change", drop, -settings.max_format_drop, is_binding=has_live),
        ]
    elif has_live:
        guards.append(Guard("regression set", None, 0.0, False, True, False))
    return tuple(guards)


def _guard(name: str, value: float | None, limit: float, *, is_upper: bool = False, is_binding: bool) -> Guard:
    """Half a millionth of grace: 16 of 20 minus 17 of 20 is not below -0.05."""
    is_kept = value is not None and (value <= limit + 5e-7 if is_upper else value >= limit - 5e-7)
    return Guard(name, value, limit, is_upper, is_binding, is_kept)
