"""The manifests of deploy/: valid by the schemas of those who read them, and safe in what they say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from paths import REPOSITORY

from dinov3_ray.cli import main
from dinov3_ray.pool.poolfile import PoolFile

DEPLOY = REPOSITORY / "deploy"
CRDS = REPOSITORY.parent / "shared" / "kuberay"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
MINIMUM_RAY = (2, 54)  # CVE-2026-27482 is fixed there


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in documents(path) if document["kind"] == kind]


def cluster_specs() -> list[dict[str, Any]]:
    specs = [cluster["spec"] for cluster in of_kind("RayCluster")]
    return specs + [job["spec"]["rayClusterSpec"] for job in of_kind("RayJob") if "rayClusterSpec" in job["spec"]]


def closed(schema: Any) -> Any:
    """A CRD's schema with unknown keys refused; Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    # `properties` may itself be a field's name; a schema has a type beside it.
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not free:
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "crd"), [("RayCluster", "rayclusters"), ("RayJob", "rayjobs")])
def test_kuberay_crds(kind: str, crd: str) -> None:
    path = CRDS / f"ray.io_{crd}.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's CRDs are not at hand: {path} is missing")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte, of which the pure Python loader makes 20 s
    definition = yaml.load(path.read_text(), Loader=loader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    validator = jsonschema.Draft7Validator(closed(version["schema"]["openAPIV3Schema"]))
    found = of_kind(kind)
    assert found
    for manifest in found:
        assert manifest["apiVersion"] == "ray.io/v1"
        # The CRD leaves metadata to Kubernetes.
        errors = [error.message for error in validator.iter_errors({**manifest, "metadata": {}})]
        assert errors == []
    broken = json.loads(json.dumps(found[0]))
    broken["spec"]["nonsense"] = 1
    assert list(validator.iter_errors({**broken, "metadata": {}})), "the validator takes anything"


def test_every_manifest_has_its_frame() -> None:
    kinds = [document["kind"] for path in MANIFESTS for document in documents(path)]
    assert sorted(kinds) == ["ConfigMap", "NetworkPolicy", "PodMonitor", "RayCluster", "RayJob"]
    for path in MANIFESTS:
        for document in documents(path):
            assert document.keys() >= {"apiVersion", "kind", "metadata"}
            assert re.fullmatch(r"[a-z0-9-]+", document["metadata"]["name"])


def test_clusters_ask_for_the_token_and_shut_the_door() -> None:
    specs = cluster_specs()
    assert len(specs) == 2
    for spec in specs:
        assert tuple(map(int, spec["rayVersion"].split(".")[:2])) >= MINIMUM_RAY
        assert spec["authOptions"] == {"mode": "token", "secretName": "dinov3-token"}
        assert spec["networkPolicy"]["mode"] == "DenyAllIngress"
        assert all(rule["from"] for rule in spec["networkPolicy"].get("head", {}).get("ingressRules", []))
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def pods() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(start parameters, pod) of every group."""
    for spec in cluster_specs():
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            yield group["rayStartParams"], group["template"]["spec"]


def test_pods() -> None:
    for parameters, pod in pods():
        assert parameters["metrics-export-port"] == "8090"
        assert all(isinstance(value, str) for value in parameters.values()), "KubeRay takes text alone"
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"name": "metrics", "containerPort": 8090} in container["ports"]
        assert container["resources"]["requests"] == container["resources"]["limits"], (
            "Ray takes limits for what it has"
        )
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        shared = mounts["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        store = int(parameters.get("object-store-memory", 0))
        assert store < int(shared["sizeLimit"].removesuffix("Gi")) * 2**30
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        tolerated = [toleration["key"] for toleration in pod.get("tolerations", [])]
        assert (gpus is not None) == ("nvidia.com/gpu" in tolerated)


def test_the_gpu_group_grows() -> None:
    (cluster,) = of_kind("RayCluster")
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert cluster["spec"]["autoscalerOptions"]["version"] == "v2"
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


def test_who_gets_in() -> None:
    (cluster,) = of_kind("RayCluster")
    (policy,) = of_kind("NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert all(rule["from"] for rule in policy["spec"]["ingress"]), "a rule without `from` lets everyone in"
    (monitor,) = of_kind("PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    # The alert on silent nodes goes by the job's name, which is the operator's own unless said otherwise.
    assert {"targetLabel": "job", "replacement": "dinov3-ray"} in endpoint["relabelings"]


def test_jobs_run_commands_that_there_are() -> None:
    for job in of_kind("RayJob"):
        program, name, *arguments = job["spec"]["entrypoint"].split()
        assert program == "dinov3-ray"
        context = main.make_context("dinov3-ray", [name], resilient_parsing=True)
        command = main.get_command(context, name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known
        assert job["spec"]["activeDeadlineSeconds"] > 0


def pool_files() -> list[str]:
    (config,) = of_kind("ConfigMap")
    return [(DEPLOY / "pool.yaml").read_text(), config["data"]["pool.yaml"]]


@pytest.mark.parametrize("text", pool_files(), ids=["pool.yaml", "ConfigMap"])
def test_pool_files(text: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text(text.replace("/models/dinov3-vitl16", str(tiny_checkpoint)))
    read = PoolFile.read(path)
    labels = read.spec.placement.label_selector
    assert (read.name, read.spec.placement.num_gpus, labels) == ("dinov3", 1, {"role": "teacher"})
    (cluster,) = of_kind("RayCluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    assert group["labels"].items() >= labels.items(), "no node carries the labels that replicas need"
    assert read.spec.replicas == (group["minReplicas"], group["maxReplicas"])


def test_ray_up() -> None:
    config = yaml.safe_load((DEPLOY / "ray" / "up.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "nonsense": 1}, schema)
    for key, script in (("head_start_ray_commands", "head.sh"), ("worker_start_ray_commands", "worker.sh")):
        (command,) = config[key]
        assert script in command
        assert subprocess.run(["bash", "-n", "-c", command], check=False, timeout=60).returncode == 0
        options = set(re.findall(r"(--[a-z-]+)", command.split(" -- ")[0]))
        shown = subprocess.run([DEPLOY / "ray" / script, "--help"], capture_output=True, text=True, check=True).stdout
        assert options <= set(re.findall(r"(--[a-z-]+)", shown))
