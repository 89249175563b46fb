"""Monitoring: the rules by Prometheus's own checker, and the metrics that dashboard and alerts name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from monitoring import EXPORTED, MONITORING, alerts, queries

from dinov3_ray.pool.metrics import Kind


@pytest.fixture
def promtool() -> Callable[..., str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")

    def run(*arguments: object) -> str:
        done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_queries_name_metrics_that_there_are() -> None:
    named = set()
    for query in queries():
        names = re.findall(r"ray_dinov3_\w+", query)
        assert names
        for name in names:
            assert name in EXPORTED, f"{name} is not a metric: {query}"
            counted = re.search(rf"(rate|increase)\({name}\b", query) is not None
            assert counted == (EXPORTED[name].kind is Kind.COUNTER), query
        for label, value in re.findall(r'(\w+)=~?"([^"]*)"', query):
            assert label in ("pool", "stage", "state")
            assert label != "stage" or set(value.split("|")) <= {"queue", "preprocess", "forward", "pack", "transfer"}
            assert label != "state" or value in ("starting", "ready", "draining")
        named |= set(names)
    assert named == set(EXPORTED), "the dashboard shows all that there is"


def test_dashboard_frame() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(ids), "no panel lies on another"
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "pool"}


def test_alerts_have_their_frame() -> None:
    for rule in alerts().values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_promtool_takes_rules_and_configuration(promtool: Callable[..., str]) -> None:
    assert f"SUCCESS: {len(alerts())} rules found" in promtool("check", "rules", MONITORING / "alerts.yml")
    promtool("check", "config", MONITORING / "prometheus.yml")


# For each alert: the series that bring it about, a value a minute.
FIRING = {
    "DinoV3TrainersStarved": {
        'ray_dinov3_trainer_wait_seconds_total{pool="p"}': "0+12x60",
        'ray_dinov3_trainer_seconds_total{pool="p"}': "0+60x60",
    },
    "DinoV3NoReplicas": {'ray_dinov3_replicas{pool="p",state="ready"}': "0x60"},
    "DinoV3ReplicasMissing": {
        'ray_dinov3_replicas{pool="p",state="ready"}': "2x60",
        'ray_dinov3_replicas_target{pool="p"}': "4x60",
    },
    # Replicas and the controller tell of what has not happened yet as 0: else the first one of these would not count.
    "DinoV3Restarts": {'ray_dinov3_restarts_total{pool="p"}': "0x40 1 2 3x20"},
    "DinoV3Rejected": {
        'ray_dinov3_rejected_total{pool="p",replica="r1"}': "0+20x60",
        'ray_dinov3_batches_total{pool="p",replica="r1"}': "0+60x60",
    },
    "DinoV3Errors": {'ray_dinov3_errors_total{pool="p",replica="r1"}': "0x50 1x10"},
    "DinoV3SlowStage": {
        'ray_dinov3_stage_seconds_total{pool="p",stage="transfer"}': "0+30x60",
        'ray_dinov3_stage_seconds_total{pool="p",stage="forward",replica="r1"}': "0+20x60",
    },
    "DinoV3NodeSilent": {'up{job="dinov3-ray",instance="n1:8090"}': "0x60"},
}
CALM = {
    'ray_dinov3_trainer_wait_seconds_total{pool="p"}': "0+1x60",
    'ray_dinov3_trainer_seconds_total{pool="p"}': "0+60x60",
    'ray_dinov3_replicas{pool="p",state="ready"}': "4x60",
    'ray_dinov3_replicas_target{pool="p"}': "4x60",
    'ray_dinov3_rejected_total{pool="p",replica="r1"}': "3x60",
    'ray_dinov3_errors_total{pool="p",replica="r1"}': "1x60",
    'ray_dinov3_restarts_total{pool="p"}': "0x40 1 2x20",
    'ray_dinov3_batches_total{pool="p",replica="r1"}': "0+60x60",
    'ray_dinov3_stage_seconds_total{pool="p",stage="transfer"}': "0+5x60",
    'ray_dinov3_stage_seconds_total{pool="p",stage="forward",replica="r1"}': "0+20x60",
    'up{job="dinov3-ray",instance="n1:8090"}': "1x60",
}


@pytest.mark.slow
def test_each_alert_fires_when_it_should_and_not_else(promtool: Callable[..., str], tmp_path: Path) -> None:
    assert FIRING.keys() == alerts().keys()

    def series(values: dict[str, str]) -> list[dict[str, str]]:
        return [{"series": name, "values": value} for name, value in values.items()]

    def selector(alert: str, state: str = "firing") -> str:
        return f'count(ALERTS{{alertname="{alert}",alertstate="{state}"}}) or vector(0)'

    cases = [
        {
            "interval": "1m",
            "input_series": series(FIRING.get(name, CALM)),
            "promql_expr_test": [
                {
                    "expr": selector(alert),
                    "eval_time": "55m",
                    "exp_samples": [{"labels": "{}", "value": int(alert == name)}],
                }
                for alert in (alerts() if name == "calm" else [name])
            ],
        }
        for name in ["calm", *FIRING]
    ]
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(MONITORING / "alerts.yml")], "tests": cases}))
    promtool("test", "rules", path)
