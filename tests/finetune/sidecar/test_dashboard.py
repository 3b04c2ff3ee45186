"""The dashboard for Grafana asks for series that server and sidecar have, by labels that these have."""

import json
import re
from pathlib import Path

from finetune.sidecar.metrics import SidecarMetrics
from tests.server.test_metrics_documented import exposed_names

DASHBOARD = Path(__file__).resolve().parents[3] / "deploy/grafana/sterna.json"


def _panels() -> list[dict[str, object]]:
    return [one for one in json.loads(DASHBOARD.read_text())["panels"] if one["type"] != "row"]


def _expressions() -> list[str]:
    return [target["expr"] for panel in _panels() for target in panel["targets"]]  # type: ignore[attr-defined]


def test_every_series_exists() -> None:
    exposition = SidecarMetrics().render()[0].decode()
    kinds = dict(re.findall(r"^# TYPE sterna_(\w+) (\w+)$", exposition, re.MULTILINE))
    known = exposed_names() | set(kinds)
    named = {name for one in _expressions() for name in re.findall(r"\bsterna_(\w+)", one)}
    assert len(named) > 30
    assert named <= known


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in _panels():
        place = panel["gridPos"]
        assert isinstance(place, dict)
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
        taken |= cells
