"""The chart's manifests are valid, the same under both Helms, and fit each other."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import helm_python
import pytest
import yaml

from tests.support.charts import (
    CHART,
    EVERYTHING,
    EXAMPLES,
    NAMESPACE,
    VALUES,
    Manifest,
    helm3,
    notes,
    one,
    pods,
    read,
    render3,
    render4,
)
from tests.support.manifests import KUBE_VERSIONS, problems

EVERY_VALUES = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
CPU_GROUP = {"name": "a", "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "40Gi"}}}
_rendered: dict[str, list[Manifest]] = {}


def rendered(path) -> list[Manifest]:
    """By the newest Helm, once; `test_both_helms` says that the oldest renders the same."""
    if path.stem not in _rendered:
        _rendered[path.stem] = render4(read(path))
    return copy.deepcopy(_rendered[path.stem])


def labels(template: Manifest) -> dict[str, str]:
    return template["metadata"]["labels"]


def matches(selector: Manifest, pod_labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return all(pod_labels.get(k) == v for k, v in wanted.items()) and all(
        pod_labels.get(e["key"]) in e["values"] for e in expressions
    )


def selected(manifests: list[Manifest], selector: Manifest) -> set[str]:
    """Names of the pods that a selector means: "head", worker groups, "test"."""
    by_name = {name: labels(pod) for name, pod in pods(manifests).items()}
    by_name["test"] = one(manifests, "Pod")["metadata"]["labels"]
    return {name for name, own in by_name.items() if matches(selector, own)}


# -- validity ------------------------------------------------------------------------------------


@EVERY_VALUES
def test_both_helms_render_the_same(values):
    assert render3(read(values)) == rendered(values)


@EVERY_VALUES
@pytest.mark.parametrize("kube_version", KUBE_VERSIONS)
def test_every_object_is_valid(values, kube_version):
    found = {
        (m["kind"], m["metadata"]["name"]): problems(m, kube_version) for m in rendered(values)
    }
    assert {key: errors for key, errors in found.items() if errors} == {}
    assert all(m["metadata"].get("namespace") in (NAMESPACE, None) for m in rendered(values))


def test_everything_means_every_kind_of_the_chart():
    sources = "".join(path.read_text() for path in (CHART / "templates").rglob("*.yaml"))
    kinds = {line.split()[1] for line in sources.splitlines() if line.startswith("kind: ")}
    routes = {"HTTPRoute", "GRPCRoute"}
    assert {m["kind"] for m in rendered(EVERYTHING)} == kinds - {"{{"} | routes


@EVERY_VALUES
def test_lint(values):
    helm3("lint", str(CHART), "--strict", "-f", str(values))
    report = helm_python.lint(str(CHART), read(values), strict=True, kube_version="v1.34.0")
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize(
    ("kind", "path", "key", "value"),
    [
        ("RayService", "spec", "excludeHeadPodFromServeService", True),
        ("RayService", "spec", "rayClusterDeletionDelaySeconds", "300"),
        ("RayService", "spec.rayClusterConfig.headGroupSpec.template.spec", "volume", []),
        ("NetworkPolicy", "spec", "policyType", ["Ingress"]),
        ("PodDisruptionBudget", "spec", "minAvailable", 1.5),
        ("PodMonitor", "spec", "podMetricsEndpoint", []),
        ("PrometheusRule", "spec", "group", []),
        ("HTTPRoute", "spec", "hostname", "a"),
        ("Ingress", "spec", "rule", []),
    ],
)
def test_the_validation_has_teeth(kind, path, key, value):
    manifest = next(m for m in rendered(EVERYTHING) if m["kind"] == kind)
    assert problems(manifest) == []
    node = manifest
    for part in path.split("."):
        node = node[part]
    node[key] = value
    assert problems(manifest)


# -- what selects what ---------------------------------------------------------------------------


@EVERY_VALUES
def test_every_selector_matches_the_pods_it_means(values):
    manifests = rendered(values)
    nodes = set(pods(manifests))
    workers = nodes - {"head"}
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "PodDisruptionBudget":
            component = manifest["metadata"]["name"].rsplit("-", 1)[1]
            meant = {"head"} if component == "head" else workers
            assert selected(manifests, spec["selector"]) == meant
        elif manifest["kind"] == "PodMonitor":
            assert selected(manifests, spec["selector"]) == nodes
        elif manifest["kind"] == "NetworkPolicy":
            assert selected(manifests, spec["podSelector"]) == nodes
            peers = [p for rule in spec["ingress"] for p in rule["from"] if "podSelector" in p]
            means = [selected(manifests, peer["podSelector"]) for peer in peers]
            assert means[:2] == [nodes, {"test"}]


@EVERY_VALUES
def test_every_reference_to_a_port_finds_one(values):
    manifests = rendered(values)
    service = one(manifests, "RayService")
    name = f"{service['metadata']['name']}-serve-svc"
    ports = {
        component: {port["name"]: port["containerPort"] for port in ports_of(pod)}
        for component, pod in pods(manifests).items()
    }
    for port in service["spec"]["serveService"]["spec"]["ports"]:
        # KubeRay takes the ports of the Service from the head's container, by name.
        assert all(own[port["name"]] == port["port"] for own in ports.values())
    http, grpc = ports["head"]["serve"], ports["head"]["serve-grpc"]
    for manifest in manifests:
        grpc_front = manifest["metadata"]["name"].endswith("-grpc")
        if manifest["kind"] == "Ingress":
            (rule,) = manifest["spec"]["rules"]
            wanted = {"name": name, "port": {"number": grpc if grpc_front else http}}
            assert all(path["backend"]["service"] == wanted for path in rule["http"]["paths"])
        elif manifest["kind"] in ("HTTPRoute", "GRPCRoute"):
            (backend,) = manifest["spec"]["rules"][0]["backendRefs"]
            assert backend == {"name": name, "port": grpc if grpc_front else http}
        elif manifest["kind"] == "PodMonitor":
            for endpoint in manifest["spec"]["podMetricsEndpoints"]:
                assert endpoint["port"] in ports["head"]
        elif manifest["kind"] == "Pod":
            (url,) = (e for e in manifest["spec"]["containers"][0]["env"] if e["name"] == "URL")
            assert url["value"] == f"http://{name}:{http}"


def ports_of(pod: Manifest) -> list[dict[str, Any]]:
    return pod["spec"]["containers"][0]["ports"]


def test_the_network_policy_opens_nothing_else():
    manifests = rendered(EVERYTHING)
    http, grpc = 8001, 9001
    policy = one(manifests, "NetworkPolicy")["spec"]
    opened: dict[str, set[int] | None] = {}
    for rule in policy["ingress"]:
        for peer in rule["from"]:
            opened[yaml.safe_dump(peer)] = {p["port"] for p in rule.get("ports", [])} or None
    nodes, operator, monitoring, test, clients = opened.values()
    assert nodes is None
    assert operator == {8265, http}
    assert monitoring == {8080, 44217, 44227, http}
    # Neither Ray's ports nor HAProxy's statistics (8404, 9101) nor the ingresses' own servers.
    assert test == clients == {http, grpc}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert len(policy["egress"]) == 3


def test_only_the_api_is_exposed():
    """Neither /metrics nor reflection nor Serve's own paths."""
    manifests = rendered(EVERYTHING)
    paths = {
        manifest["metadata"]["name"]: [
            path["path"] for path in manifest["spec"]["rules"][0]["http"]["paths"]
        ]
        for manifest in manifests
        if manifest["kind"] == "Ingress"
    }
    services = ["tokenflow.v1.Inference", "grpc.health.v1.Health"]
    assert paths == {
        "everything": ["/v1", "/health"],
        "everything-grpc": [f"/{service}" for service in services],
    }
    (rule,) = one(manifests, "HTTPRoute")["spec"]["rules"]
    assert [match["path"] for match in rule["matches"]] == [
        {"type": "PathPrefix", "value": path} for path in paths["everything"]
    ]
    (rule,) = one(manifests, "GRPCRoute")["spec"]["rules"]
    assert [match["method"] for match in rule["matches"]] == [{"service": s} for s in services]


def test_alerts_and_dashboard_are_the_ones_of_the_repository():
    manifests = rendered(EVERYTHING)
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert one(manifests, "PrometheusRule")["spec"] == alerts
    (dashboard,) = (m for m in manifests if m["metadata"]["name"].endswith("-dashboard"))
    assert dashboard["data"] == {"tokenflow.json": (CHART / "files" / "dashboard.json").read_text()}


# -- what builds a second cluster, and what does not ---------------------------------------------


@pytest.fixture
def newer_chart(tmp_path):
    newer = tmp_path / "tokenflow"
    shutil.copytree(CHART, newer)
    meta = yaml.safe_load((newer / "Chart.yaml").read_text())
    changed = meta | {"version": "9.9.9", "appVersion": "9.9.9"}
    (newer / "Chart.yaml").write_text(yaml.safe_dump(changed))
    return newer


@EVERY_VALUES
def test_a_newer_chart_leaves_the_cluster_alone(values, newer_chart):
    """Where the image is named, as in all examples."""
    before, after = rendered(values), render4(read(values), newer_chart)
    assert before != after
    for part in ("rayClusterConfig", "serveConfigV2"):
        assert one(before, "RayService")["spec"][part] == one(after, "RayService")["spec"][part]


def test_an_image_that_is_not_named_is_that_of_the_chart(newer_chart):
    images = [
        {container["image"] for pod in pods(render4(values, chart)).values()
         for container in pod["spec"]["containers"]}
        for chart in (CHART, newer_chart)
        for values in ({}, {"workerGroups": [CPU_GROUP]})
    ]  # fmt: skip
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    names = [f"tokenflow-serve:{v}-{kind}" for v in (version, "9.9.9") for kind in ("gpu", "cpu")]
    assert images == [{name} for name in names]


@pytest.mark.parametrize(
    "change",
    [{"tag": "0.2.0-gpu"}, {"digest": "sha256:" + "1" * 64}],
    ids=["tag", "digest"],
)
def test_another_image_changes_the_images_and_nothing_else(change):
    values = read(EXAMPLES / "one-gpu.yaml")
    before = one(render4(values), "RayService")["spec"]
    values["image"] |= change
    after = one(render4(values), "RayService")["spec"]
    assert before != after

    def without_images(spec):
        for pod in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            for container in pod["template"]["spec"]["containers"]:
                del container["image"]
        return spec

    before, after = ({**s, "rayClusterConfig": without_images(s["rayClusterConfig"])}
                     for s in (before, after))  # fmt: skip
    assert before == after


@pytest.mark.parametrize("key", ["commonLabels", "commonAnnotations"])
def test_common_labels_stay_out_of_the_cluster(key):
    plain, labelled = (render4(read(EVERYTHING) | {key: {"a": v}}) for v in ("b", "c"))
    before, after = (one(m, "RayService") for m in (plain, labelled))
    assert before["metadata"] != after["metadata"]
    assert before["spec"]["rayClusterConfig"] == after["spec"]["rayClusterConfig"]


def test_the_configuration_alone_is_applied_in_place():
    values = read(EVERYTHING)
    before = one(render4(values), "RayService")["spec"]
    values["config"]["engine"] = {"policy": "fcfs", "max_num_seqs": 7}
    values["config"]["replicas"]["count"] = 2
    after = one(render4(values), "RayService")["spec"]
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"serveConfigV2"}


@pytest.mark.parametrize("section", [{"model": {"path": "/other"}}, {"engine": {"block_size": 32}}])
def test_another_layout_of_kv_needs_other_pods(section):
    """A node's store keeps blocks of one size for as long as it lives."""
    values = read(EVERYTHING)
    before = one(render4(values), "RayService")["spec"]
    values["config"] |= section
    after = one(render4(values), "RayService")["spec"]
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"serveConfigV2", "rayClusterConfig"}


def test_a_new_group_at_the_end_leaves_the_others_alone():
    values = read(EVERYTHING)
    before = one(render4(values), "RayService")["spec"]["rayClusterConfig"]
    values["workerGroups"].append(values["workerGroups"][0] | {"name": "third"})
    after = one(render4(values), "RayService")["spec"]["rayClusterConfig"]
    assert after["workerGroupSpecs"][:2] == before["workerGroupSpecs"]
    assert len(after["workerGroupSpecs"]) == 3
    assert {**after, "workerGroupSpecs": 0} == {**before, "workerGroupSpecs": 0}


# -- what the user is told -----------------------------------------------------------------------


def test_notes_tell_how_to_wait_and_what_is_open():
    quiet = notes(read(EVERYTHING))
    assert "kubectl" in quiet and "helm" in quiet and "everything-serve-svc" in quiet
    assert "no TLS" in quiet and "names no other namespace" in quiet
    assert "gcsFaultTolerance" not in quiet and "apiKeys" not in quiet
    loud = notes({"auth": {"rayToken": {"enabled": False}}, "networkPolicy": {"enabled": False}})
    assert "service.type is LoadBalancer" in quiet
    for warning in ("gcsFaultTolerance", "apiKeys", "rayToken", "networkPolicy"):
        assert f"WARNING: {warning}" in loud.replace("auth.", "")
