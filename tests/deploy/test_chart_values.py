"""Wrong values fail at render, under both Helms, with a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.support.charts import (
    CHART,
    EXAMPLES,
    RenderError,
    helm3,
    one,
    pods,
    read,
    render3,
    render4,
    serve_config,
)

WRONG = {
    "unknown key": ("imagee: {}", "imagee"),
    "unknown key of a section": ("kvStore: {sise: 1Gi}", "sise"),
    "unknown key of a group": ("workerGroups: [{name: a, replica: 2}]", "replica"),
    "unknown key of the configuration": ("config: {engine: {polcy: slack}}", "polcy"),
    "wrong type": ("drainSeconds: soon", "drainSeconds"),
    "value out of range": ("config: {replicas: {count: 0}}", "count"),
    "not a quantity": ("kvStore: {size: 16 GB}", "kvStore"),
    "memory that does not add up": (
        "kvStore: {size: 64Gi}",
        "workerGroups gpu: memory does not add up: kvStore.size 64.00 GiB + sharedMemory 4.00 GiB "
        "+ processMemory 16.00 GiB = 84.00 GiB, above resources.limits.memory 40.00 GiB",
    ),
    "memory of the head": ("head: {processMemory: 6Gi}", "head: memory does not add up"),
    "object store above /dev/shm": (
        "workerDefaults: {objectStoreMemory: 8Gi}",
        "objectStoreMemory (8Gi) must fit in sharedMemory (4Gi)",
    ),
    "no memory limit": (
        "workerGroups: [{name: a, resources: {limits: {cpu: '1'}}}]",
        "workerGroups a: set resources.limits.memory",
    ),
    "request below the limit": (
        "workerGroups: [{name: a, resources: {requests: {memory: 1Gi}, limits: {memory: 40Gi}}}]",
        "must equal limits.memory",
    ),
    "too few GPUs": (
        "config: {replicas: {count: 9}}",
        "config.replicas asks for 9 replicas of 1 GPUs and 0 CPUs each, and the pods of all "
        "workerGroups have room for 1;",
    ),
    "GPUs in too many pods": (
        "{config: {engine: {tensor_parallel: 2}}, workerGroups: [{name: a, replicas: 2, "
        "resources: {requests: {cpu: 8}, limits: {memory: 40Gi, nvidia.com/gpu: 1}}}]}",
        "config.replicas asks for 1 replicas of 2 GPUs and 0 CPUs each, and the pods of all "
        "workerGroups have room for 0;",
    ),
    "too few CPUs for replicas": (
        "{config: {replicas: {count: 3, gpus_each: 0, cpus_each: 4}}}",
        "asks for 3 replicas of 0 GPUs and 4 CPUs each, and the pods of all workerGroups have "
        "room for 2;",
    ),
    "too few CPUs for ingresses": (
        "config: {ingress: {count: 9}}",
        "CPUs do not add up: 9 ingresses of 1 (ingressCpus) and 1 replicas of 0 "
        "(config.replicas.cpus_each) need 9, and all workerGroups together have 8;",
    ),
    "CPUs that are no quantity": (
        "workerGroups: [{name: a, resources: {limits: {memory: 40Gi, cpu: 1 core}}}]",
        "workerGroups a: resources: cpu must be a quantity",
    ),
    "a host that Kubernetes does not reach": (
        "config: {ingress: {host: 127.0.0.1}}",
        "config.ingress.host: 127.0.0.1",
    ),
    "TLS in the pods": (
        "config: {security: {tls: {certificate: a, key: b}}}",
        "config.security.tls: KubeRay probes",
    ),
    "keys of one's own": (
        "config: {security: {api_keys_file: a}}",
        "set auth.apiKeys.existingSecret",
    ),
    "nowhere to go": (
        "{networkPolicy: {egress: {enabled: true}}, autoscaling: {enabled: true}, "
        "config: {tracing: {endpoint: http://collector:4318/v1/traces}}}",
        "networkPolicy.egress.extra: the pods must reach the API server (autoscaling), "
        "the collector",
    ),
    "labels that pods are selected by": (
        "workerDefaults: {labels: {app.kubernetes.io/name: mine}}",
        "labels: app.kubernetes.io/name is what the chart selects pods by",
    ),
    "too few GPUs when autoscaling": (
        "config: {replicas: {autoscaling: {max: 5}}}",
        "config.replicas asks for 5 replicas",
    ),
    "missing secret of API keys": (
        "auth: {apiKeys: {enabled: true}}",
        "auth.apiKeys.existingSecret: name the Secret",
    ),
    "missing TLS secret": (
        "ingress: {grpc: {enabled: true, host: a.example.com}}",
        "ingress.grpc.tlsSecret",
    ),
    "missing Redis": ("gcsFaultTolerance: {enabled: true}", "gcsFaultTolerance.redisAddress"),
    "missing password": (
        "gcsFaultTolerance: {enabled: true, redisAddress: r:1, username: a}",
        "gcsFaultTolerance.existingSecret",
    ),
    "a host is missing": ("ingress: {enabled: true}", "ingress.host"),
    "a Gateway is missing": ("gateway: {enabled: true}", "gateway.parentRefs"),
    "two models": (
        "model: {pvc: {claimName: a}, image: {reference: b}}",
        "model: there is one model, got 2 sources (a, b)",
    ),
    "derived keys": ("config: {kvstore: {host_kv_gib: 4}}", "set kvStore.size"),
    "two groups of one name": (
        "workerGroups: [&g {name: a, resources: {limits: {memory: 40Gi}}}, *g]",
        "two groups have this name",
    ),
    "min above max": ("workerDefaults: {minReplicas: 3}", "minReplicas 3 is above maxReplicas 1"),
    "a flag that KubeRay derives": (
        "workerDefaults: {rayStartParams: {num-gpus: '8'}}",
        "rayStartParams.num-gpus",
    ),
    "a variable that KubeRay sets": (
        "env: [{name: RAY_REDIS_ADDRESS, value: a}]",
        "env RAY_REDIS_ADDRESS",
    ),
    "an incremental upgrade without a class": (
        "{autoscaling: {enabled: true}, upgrade: {type: NewClusterWithIncrementalUpgrade}}",
        "upgrade.incremental.gatewayClassName",
    ),
    "an incremental upgrade without autoscaling": (
        "{upgrade: {type: NewClusterWithIncrementalUpgrade, incremental: {gatewayClassName: a}}}",
        "needs autoscaling.enabled",
    ),
    "steps above the surge": (
        "{autoscaling: {enabled: true}, upgrade: {type: NewClusterWithIncrementalUpgrade, "
        "incremental: {gatewayClassName: a, maxSurgePercent: 5}}}",
        "stepSizePercent must not be above maxSurgePercent",
    ),
    "a name that is too long": (f"fullnameOverride: a{'b' * 47}", "at most 47 characters"),
    "a name that starts with a digit": ("fullnameOverride: 1st", "must start with a letter"),
    "GPUs on the head": (
        "head: {resources: {limits: {nvidia.com/gpu: 1}}}",
        "head.resources: the head runs no model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("render", [render3, render4], ids=["helm 3.10", "helm 4"])
def test_wrong_values(render, case):
    text, message = WRONG[case]
    with pytest.raises(RenderError) as caught:
        render(yaml.safe_load(text))
    assert message in str(caught.value)


def test_a_model_from_an_image_needs_a_kubernetes_that_has_it():
    values = yaml.safe_dump({"model": {"image": {"reference": "m:1"}}})
    flags = ["rel", str(CHART), "-f", "-", "--kube-version"]
    with pytest.raises(RenderError, match=r"model.image needs Kubernetes 1.33 or later, this is"):
        helm3("template", *flags, "1.32.1", stdin=values)
    assert helm3("template", *flags, "1.33.0", stdin=values)


def test_an_older_kubernetes_is_refused():
    with pytest.raises(RenderError, match="kubeVersion"):
        helm3("template", "rel", str(CHART), "--kube-version", "1.29.9")


def test_the_defaults_are_right():
    assert one(render4({}), "RayService")["metadata"]["name"] == "rel-tokenflow"


# -- what becomes of values ----------------------------------------------------------------------


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    (application,) = serve_config(render4(values))["applications"]
    return application["args"]


def test_a_replica_has_a_gpu_where_there_are_any_else_a_cpu():
    assert arguments({})["replicas"] == {"gpus_each": 1}
    group = {"name": "a", "resources": {"limits": {"memory": "40Gi", "nvidia.com/gpu": "2"}}}
    engine = {"tensor_parallel": 2}
    divided = arguments({"workerGroups": [group], "config": {"engine": engine}})
    assert divided["replicas"] == {"gpus_each": 2}
    values = read(EXAMPLES / "kind-cpu.yaml")
    assert arguments(values)["replicas"] == {"gpus_each": 0, "cpus_each": 1}


def test_what_the_user_says_wins_even_when_it_is_nothing():
    said = {"gpus_each": 0, "cpus_each": 3}
    for render in (render3, render4):
        (application,) = serve_config(render({"config": {"replicas": said}}))["applications"]
        assert application["args"]["replicas"] == said
        group = {"name": "a", "minReplicas": 0, "resources": {"limits": {"memory": "40Gi"}}}
        values = {"workerGroups": [group], "autoscaling": {"enabled": True}}
        cluster = one(render(values), "RayService")["spec"]["rayClusterConfig"]
        assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0


def test_serve_config_goes_over_what_is_rendered():
    values = {"serveConfig": {"http_options": {"keep_alive_timeout_s": 9}}}
    options = serve_config(render4(values))["http_options"]
    assert options == {"host": "0.0.0.0", "port": 8000, "keep_alive_timeout_s": 9}


def test_without_a_kv_store_there_is_no_volume():
    values = {"kvStore": {"size": "0"}}
    assert arguments(values)["kvstore"] == {"host_kv_gib": 0}
    volumes = pods(render4(values))["gpu"]["spec"]["volumes"]
    assert "kv" not in {volume["name"] for volume in volumes}


@pytest.mark.parametrize(
    ("model", "volume"),
    [
        ({"pvc": {"claimName": "m", "subPath": "x"}}, "persistentVolumeClaim"),
        ({"objectStore": {"uri": "s3://m"}}, "emptyDir"),
        ({"image": {"reference": "m:1"}}, "image"),
    ],
)
def test_a_model_is_mounted_where_it_is_read(model, volume):
    manifests = render4({"model": model})
    assert arguments({"model": model})["model"] == {"path": "/models"}
    worker = pods(manifests)["gpu"]["spec"]
    (made,) = (v for v in worker["volumes"] if v["name"] == "model")
    assert volume in made
    (mount,) = (m for m in worker["containers"][0]["volumeMounts"] if m["name"] == "model")
    assert mount["mountPath"] == "/models" and mount["readOnly"]
    assert ("initContainers" in worker) == ("objectStore" in model)
    assert "model" not in {v["name"] for v in pods(manifests)["head"]["spec"]["volumes"]}


def test_a_path_of_ones_own_in_the_image_or_volume():
    values = {"model": {"pvc": {"claimName": "m"}}, "config": {"model": {"path": "/models/a"}}}
    assert arguments(values)["model"] == {"path": "/models/a"}


def test_a_digest_wins_over_the_tag():
    digest = "sha256:" + "0" * 64
    image = {"repository": "r", "tag": "t", "digest": digest}
    container = pods(render4({"image": image}))["head"]["spec"]["containers"][0]
    assert container["image"] == f"r@{digest}"
