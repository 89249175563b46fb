"""Every query of dashboard and alerts, asked by a Prometheus that scrapes a live pool."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from monitoring import MONITORING, panels, queries

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.testing import FakeTeacher

POOL = "watched"


@pytest.fixture
def prometheus(ray_cluster: str, tmp_path: Path) -> Iterator[str]:
    """A server that scrapes the tests' Ray, with deploy's configuration but for where, and how often."""
    server = shutil.which("prometheus")
    if server is None:
        pytest.skip("prometheus is not installed (Debian's package prometheus)")
    (node,) = ray.nodes()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    # A node that has much to tell, and little time, takes more than the second that an interval of a second allows.
    config["global"] = {"scrape_interval": "4s", "evaluation_interval": "1s"}
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
                assert time.monotonic() < deadline, (
                    f"these find nothing: {[*open_.values()]}; the node: {ask(prometheus, 'up')}"
                )
            assert all(answer["metric"]["pool"] == POOL for answer in found[panels()["Replicas"][0]])
            assert len(found) >= len(queries())
            (node,) = ask(prometheus, "up")
            assert (node["metric"]["job"], node["value"][1]) == ("dinov3-ray", "1"), "DinoV3NodeSilent goes by that"
            for query, answer in found.items():  # `pytest -rP` shows what each found
                print(f"{len(answer)} series, the first at {answer[0]['value'][1]}: {query}")
