"""What deploy/monitoring holds: alerts, panels and their queries."""

from __future__ import annotations

import json
from typing import Any

import yaml
from paths import DEPLOY

from dinov3_ray.pool.metrics import METRICS, Kind, Metric

MONITORING = DEPLOY / "monitoring"


def exported_name(metric: Metric) -> str:
    """Its name in Prometheus, as Ray gives it."""
    return f"ray_{metric.name}_total" if metric.kind is Kind.COUNTER else f"ray_{metric.name}"


EXPORTED = {exported_name(metric): metric for metric in METRICS.values()}


def alerts() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def panels() -> dict[str, list[str]]:
    """Each panel's title, and its queries."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in dashboard["panels"]}


def queries() -> list[str]:
    found = [query for shown in panels().values() for query in shown]
    return found + [rule["expr"] for name, rule in alerts().items() if name != "DinoV3NodeSilent"]
