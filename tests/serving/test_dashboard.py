"""The Grafana dashboard in `examples/` asks only for metrics and labels that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from outdraft.core.statistics import Statistics
from outdraft.serving.jobs import Delta
from outdraft.serving.metrics import Metrics

DASHBOARD = Path(__file__).resolve().parents[2] / "examples" / "grafana.json"


def exposed() -> dict[str, set[str]]:
    """Sample name -> label names of a server on which everything has happened that is counted."""
    metrics, job = Metrics("tiny"), SimpleNamespace(arrived=0.0)
    metrics.admitted(job, 3, True)  # type: ignore[arg-type]
    metrics.grown(job, Delta(0, [], 1, [], [], None, "stop"), True)  # type: ignore[arg-type]
    metrics.ended(job)  # type: ignore[arg-type]
    metrics.ended(job, "error")  # type: ignore[arg-type]
    statistics = Statistics()
    statistics.add_round(drafted=2, depth=2, accepted=1, emitted=2)
    metrics.decoded(statistics)
    samples = re.findall(r"^(outdraft:\w+)\{(.*)\} ", metrics.text().decode(), re.MULTILINE)
    return {name: set(re.findall(r"(\w+)=", labels)) for name, labels in samples}


def test_every_panel_asks_for_what_a_server_has() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    there = exposed()
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > len(dashboard["panels"]) >= 10
    for expression in expressions:
        names = re.findall(r"outdraft:\w+", expression)
        assert names and set(names) <= there.keys(), expression
        by = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert by <= set.union(*(there[name] for name in names)), expression
        assert expression.count("(") == expression.count(")")
    cells = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(cells) == len(dashboard["panels"]) == len({panel["id"] for panel in dashboard["panels"]})
