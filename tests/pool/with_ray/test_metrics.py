"""What a live pool publishes, scraped from the port that Prometheus would scrape."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import ray
import torch
from monitoring import exported_name

from dinov3_ray import FeatureSpec, TeacherPool
from dinov3_ray.pool.metrics import METRICS, Publisher, Sample
from dinov3_ray.testing import FakeTeacher

Labels = frozenset[tuple[str, str]]
Samples = dict[str, dict[Labels, float]]

OWN_LABELS = {"pool", "replica", "stage", "state"}
SPEC = FeatureSpec(cls=True, feature_map=True)
TRANSFER = frozenset({("stage", "transfer")})  # a client has no replica


def scrape(pool: str) -> Samples:
    """Every sample of ``pool`` by name and labels of ours, added up over processes."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    samples: Samples = defaultdict(lambda: defaultdict(float))
    for name, labels, value in re.findall(r"^(ray_dinov3_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if found["pool"] == pool:
            ours = frozenset((key, found[key]) for key in found.keys() & OWN_LABELS - {"pool"} if found[key])
            samples[name][ours] += float(value)
    return samples


def scrape_until(pool: str, what: Callable[[Samples], bool], timeout: float = 60.0) -> Samples:
    deadline = time.monotonic() + timeout
    while not what(samples := scrape(pool)):
        assert time.monotonic() < deadline, f"not seen in time; the last scrape: {samples}"
        time.sleep(0.2)
    return samples


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for found, value in samples[exported_name(METRICS[name])].items() if found >= set(labels.items()))


@pytest.fixture(scope="module")
def pool(ray_cluster: str) -> Iterator[TeacherPool]:
    # Each replica's first pass raises, so that there are errors and retries to see.
    factory = FakeTeacher.factory(fail_on=(0,), delay=0.005)
    with TeacherPool.start(factory, name="observed", replicas=2, health_interval=0.2, max_queued=1) as started:
        yield started


def test_a_pool_at_work(pool: TeacherPool) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with pool.teacher() as teacher:
        handles = [teacher.submit(images, SPEC) for _ in range(40)]
        for handle in handles:
            handle.result(60)
        steps = list(teacher.prefetch([images] * 20, SPEC, images=lambda batch: batch, depth=2))
        assert len(steps) == 20
        statistics = teacher.statistics()
    assert statistics.resends > 0

    served = 60 * len(images)

    def all_told(seen: Samples) -> bool:
        """Replicas, client and controller: each tells at times of its own."""
        done = total(seen, "dinov3_images") >= served and total(seen, "dinov3_answers") >= 60
        # What one process publishes together need not be exported together.
        done = done and TRANSFER in seen["ray_dinov3_stage_seconds_total"]
        idle = total(seen, "dinov3_in_flight") == total(seen, "dinov3_waiting") == 0  # the client is closed
        return done and idle and total(seen, "dinov3_replicas", state="ready") == 2

    samples = scrape_until("observed", all_told)
    assert total(samples, "dinov3_images") == served
    assert total(samples, "dinov3_answers") == 60
    assert total(samples, "dinov3_batches") == 60
    assert total(samples, "dinov3_retries") == statistics.resends
    # A replica that never got work has not failed; one that did failed once.
    replicas = {replica for labels in samples["ray_dinov3_images_total"] for key, replica in labels if key == "replica"}
    assert total(samples, "dinov3_errors") == len(replicas) == 2
    assert total(samples, "dinov3_rejected") > 0
    for stage in ("queue", "forward", "pack"):
        for replica in replicas:
            assert total(samples, "dinov3_stage_seconds", stage=stage, replica=replica) > 0
    assert total(samples, "dinov3_stage_seconds", stage="forward") > 60 * 0.005
    assert samples["ray_dinov3_stage_seconds_total"].keys() >= {TRANSFER}
    waited, looped = (total(samples, f"dinov3_trainer_{name}") for name in ("wait_seconds", "seconds"))
    assert 0 < waited <= looped
    assert total(samples, "dinov3_replicas_target") == 2


def test_a_lost_replica_shows(pool: TeacherPool) -> None:
    pid = pool.status().replicas[0].pid
    assert pid is not None
    samples = scrape_until("observed", lambda seen: "ray_dinov3_restarts_total" in seen)
    assert total(samples, "dinov3_restarts") == 0, "growth shows from the first one on"
    os.kill(pid, signal.SIGKILL)
    samples = scrape_until("observed", lambda seen: total(seen, "dinov3_restarts") > 0)
    assert total(samples, "dinov3_restarts") == 1
    scrape_until("observed", lambda seen: total(seen, "dinov3_replicas", state="ready") == 2)


def test_two_clients_of_one_process_add_up(ray_cluster: str) -> None:
    one, other = Publisher("shared"), Publisher("shared")
    one.publish([Sample("dinov3_in_flight", 3), Sample("dinov3_answers", 5)])
    other.publish([Sample("dinov3_in_flight", 4), Sample("dinov3_answers", 10)])
    one.publish([Sample("dinov3_in_flight", 2), Sample("dinov3_answers", 6)])
    samples = scrape_until("shared", lambda seen: total(seen, "dinov3_answers") == 16)
    assert total(samples, "dinov3_in_flight") == 6
    other.close()
    scrape_until("shared", lambda seen: total(seen, "dinov3_in_flight") == 2)
    one.close()
    scrape_until("shared", lambda seen: total(seen, "dinov3_in_flight") == 0)


def test_every_metric_is_exported_as_it_says(ray_cluster: str) -> None:
    """Ray drops a metric whose name or labels it does not like, with no more than a warning."""
    publisher = Publisher("every", "r1")
    publisher.publish(Sample(metric.name, 0, metric.by or "") for metric in METRICS.values())
    samples = scrape_until("every", lambda seen: len(seen) >= len(METRICS))
    assert {value for found in samples.values() for value in found.values()} == {0}
    publisher.publish(Sample(metric.name, 7, metric.by or "") for metric in METRICS.values())
    samples = scrape_until("every", lambda seen: all(total(seen, name) == 7 for name in METRICS))
    for metric in METRICS.values():
        labels = {"replica": "r1"} if metric.per_replica else {}
        labels |= {metric.by: metric.by} if metric.by else {}
        assert dict(samples[exported_name(metric)]) == {frozenset(labels.items()): 7}
    publisher.close()
