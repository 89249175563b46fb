"""Monitoring: rules by Prometheus's own checker, and every query of dashboard and alerts against a pool that lives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from paths import DEPLOY

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.pool.metrics import METRICS, Kind
from dinov3_ray.testing import FakeTeacher

MONITORING = DEPLOY / "monitoring"
EXPORTED = {metric.exported: metric for metric in METRICS.values()}
POOL = "watched"


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
            assert name in EXPORTED, f"{name} is no metric: {query}"
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


# Against a live pool --------------------------------------------------------------------------------------------------


@pytest.fixture
def prometheus(ray_cluster: str, tmp_path: Path) -> Iterator[str]:
    """A server that scrapes the tests' Ray, with deploy's configuration but for where, and how often."""
    server = shutil.which("prometheus")
    if server is None:
        pytest.skip("prometheus is not installed (Debian's package prometheus)")
    (node,) = ray.nodes()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    nodes = tmp_path / "nodes.json"
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    # As Ray writes it, with a label that would win over the job's name, and with metrics of its own head.
    nodes.write_text(json.dumps([{"targets": [target, "127.0.0.1:44217"], "labels": {"job": "ray"}}]))
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(nodes)]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [server, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def ask(server: str, query: str) -> list[dict[str, Any]]:
    url = f"{server}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])
    except (ConnectionError, urllib.error.URLError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code != 503:
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        return []  # the server is starting


def test_every_query_finds_what_a_live_pool_exports(prometheus: str, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    spec = FeatureSpec(cls=True)
    factory = FakeTeacher.factory(fail_on=(0,), delay=0.002)  # so that there are errors and retries to see
    with TeacherPool.start(factory, name=POOL, replicas=2, health_interval=0.2, max_queued=1) as pool:
        lost = pool.status().replicas[0].pid
        assert lost is not None
        with pool.teacher() as teacher:
            for handle in [teacher.submit(images, spec) for _ in range(40)]:
                handle.result(60)
            os.kill(lost, signal.SIGKILL)
            # Without their thresholds: whether an alert holds is another test's.
            open_ = {
                query: re.sub(r" (==|>) [\d.]+$", "", query)
                .replace("$pool", POOL)
                .replace("$__rate_interval", "1m")
                .replace("[5m]", "[1m]")
                for query in queries()
            }
            compared = [query for query in open_ if re.search(r" < | > on ", query)]
            for query in compared:  # a comparison is two queries
                left, right = re.split(r" < | > on \(pool\) group_left \(\) ", open_.pop(query))
                open_ |= {f"{query} (left)": left, f"{query} (right)": right}
            deadline = time.monotonic() + 120
            found: dict[str, Any] = {}
            while open_:
                list(teacher.prefetch([images] * 4, spec, images=lambda batch: batch, depth=2))
                answers = {query: ask(prometheus, asked) for query, asked in open_.items()}
                found |= {query: answer for query, answer in answers.items() if answer}
                open_ = {query: asked for query, asked in open_.items() if query not in found}
                assert time.monotonic() < deadline, f"these find nothing: {[*open_.values()]}"
            assert all(answer["metric"]["pool"] == POOL for answer in found[panels()["Replicas"][0]])
            assert len(found) >= len(queries())
            (node,) = ask(prometheus, "up")
            assert (node["metric"]["job"], node["value"][1]) == ("dinov3-ray", "1"), "DinoV3NodeSilent goes by that"
            for query, answer in found.items():  # `pytest -rP` shows what each found
                print(f"{len(answer)} series, the first at {answer[0]['value'][1]}: {query}")
