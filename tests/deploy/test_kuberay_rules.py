"""What KubeRay asks and does beyond its schema, and what Serve, the engine and the store ask of the
pods. deploy/README.md says where each rule comes from."""

from __future__ import annotations

import importlib
import re
import types
import typing
from typing import Any

import pytest
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from tests.support.charts import VALUES, Manifest, one, pods, read, render4, serve_config
from tokenflow.cluster.app import APP_NAME, GRPC_SERVICERS
from tokenflow.cluster.config import embedded_model, parse_config
from tokenflow.cluster.local import SERVE_ENVIRONMENT
from tokenflow.kvstore.tables import Tables
from tokenflow.replicas.config import EngineConfig
from tokenflow.replicas.factory import inspect_model

UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}


@pytest.fixture(scope="module", params=VALUES, ids=lambda path: path.stem)
def values(request) -> dict[str, Any]:
    return read(request.param)


@pytest.fixture(scope="module")
def manifests(values) -> list[Manifest]:
    return render4(values)


@pytest.fixture
def service(manifests) -> Manifest:
    return one(manifests, "RayService")


def ray_container(pod: Manifest) -> Manifest:
    return pod["spec"]["containers"][0]


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()
    return float(number) * UNITS[unit]


def memory_volumes(pod: Manifest) -> dict[str, float]:
    """Size of each memory-backed volume by where the Ray container has it."""
    sizes = {
        volume["name"]: quantity(volume["emptyDir"]["sizeLimit"])
        for volume in pod["spec"]["volumes"]
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    }
    mounts = ray_container(pod)["volumeMounts"]
    return {m["mountPath"]: sizes[m["name"]] for m in mounts if m["name"] in sizes}


# -- the operator's own checks ---------------------------------------------------------------


def test_what_the_operator_refuses(service):
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", service["metadata"]["name"])
    assert "headService" not in cluster["headGroupSpec"]
    assert "networkPolicy" not in cluster and "tlsOptions" not in cluster
    assert "enableK8sTokenAuth" not in cluster["authOptions"]
    for group in groups:
        assert "resources" not in group
        assert not {"labels", "memory", "num-gpus"} & set(group["rayStartParams"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        names = {variable["name"] for variable in ray_container(group["template"])["env"]}
        assert not names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}
        assert "RAY_enable_autoscaler_v2" not in names
        assert "restartPolicy" not in group["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
    assert "externalStorageNamespace" not in cluster.get("gcsFaultToleranceOptions", {})


def test_the_head_serves_nobody(service):
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert "nvidia.com/gpu" not in ray_container(head["template"])["resources"]["limits"]
    # Neither ingresses nor replicas can be put there: each reserves something.
    (application,) = serve_config([service])["applications"]
    (ingress,) = application["deployments"]
    assert ingress["name"] == "ingress" and ingress["ray_actor_options"]["num_cpus"] > 0
    replicas = application["args"]["replicas"]
    assert replicas["gpus_each"] > 0 or replicas["cpus_each"] > 0


def test_an_autoscaler_is_left_to_choose_the_number_of_pods(service, manifests, values):
    cluster = service["spec"]["rayClusterConfig"]
    on = values.get("autoscaling", {}).get("enabled", False)
    assert cluster["enableInTreeAutoscaling"] is on
    assert all(("replicas" in group) != on for group in cluster["workerGroupSpecs"])
    if on:
        assert cluster["autoscalerOptions"]["version"] == "v2"
        # KubeRay makes an account with the autoscaler's rights, unless one is named.
        assert "serviceAccountName" not in pods(manifests)["head"]["spec"]


# -- pods --------------------------------------------------------------------------------------


def test_memory_adds_up(manifests):
    for pod in pods(manifests).values():
        resources = ray_container(pod)["resources"]
        limit = quantity(resources["limits"]["memory"])
        assert quantity(resources["requests"]["memory"]) == limit
        assert sum(memory_volumes(pod).values()) < limit
        # KubeRay adds a /dev/shm as large as the limit where there is none.
        assert "/dev/shm" in memory_volumes(pod)


def test_the_object_store_fits_in_dev_shm(service, manifests):
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for name, pod in pods(manifests).items():
        group = groups.get(name, cluster["headGroupSpec"])
        size = int(group["rayStartParams"]["object-store-memory"])
        assert 0 < size <= memory_volumes(pod)["/dev/shm"]


def test_the_store_with_its_tables_fits_in_its_volume(manifests):
    kvstore = serve_config(manifests)["applications"][0]["args"]["kvstore"]
    data = int(kvstore["host_kv_gib"] * 2**30)
    # The embedded model has the smallest blocks there are, and so the most.
    engine = EngineConfig()
    spec = inspect_model(embedded_model(), engine, "cpu")
    slots = data // spec.kv_layout(engine.block_size).block_bytes
    needed = data + Tables.nbytes(slots, 32) + 2 * 4096
    for name, pod in pods(manifests).items():
        volume = memory_volumes(pod).get(kvstore["directory"])
        assert (volume is None) if name == "head" else (volume >= needed)


def test_processes_have_the_environment_of_tokenflow_serve(manifests):
    for pod in pods(manifests).values():
        found = {e["name"]: e["value"] for e in ray_container(pod)["env"] if "value" in e}
        assert found.items() >= SERVE_ENVIRONMENT.items()


def test_a_pod_has_longer_to_end_than_ray_to_drain(manifests):
    for pod in pods(manifests).values():
        found = {e["name"]: e["value"] for e in ray_container(pod)["env"] if "value" in e}
        drain = int(found["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["spec"]["terminationGracePeriodSeconds"] >= drain + 30


def test_pods_meet_the_restricted_standard(service, manifests):
    templates = [*pods(manifests).values(), one(manifests, "Pod")]
    contexts = []
    for pod in templates:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
        assert all("hostPath" not in volume for volume in pod["spec"].get("volumes", ()))
        contexts.append(ray_container(pod)["securityContext"])
    options = service["spec"]["rayClusterConfig"].get("autoscalerOptions")
    if options:
        # It writes its log where KubeRay mounts nothing else.
        assert options["securityContext"]["readOnlyRootFilesystem"] is False
        contexts.append(options["securityContext"])
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_workers_get_no_rights_in_the_cluster(manifests):
    for name, pod in pods(manifests).items():
        if name != "head":
            assert pod["spec"]["automountServiceAccountToken"] is False


def test_nothing_is_latest(manifests):
    images = [c["image"] for m in pods(manifests).values() for c in m["spec"]["containers"]]
    assert all("@sha256:" in image or ":" in image.rsplit("/")[-1] for image in images)
    assert not any(image.endswith(":latest") for image in images)


# -- the Serve configuration ------------------------------------------------------------------


def unknown_keys(model: type[BaseModel], node: Any, path: str = "") -> list[str]:
    """Serve takes unknown keys without a word: `num_replicass` would go unnoticed."""
    found = []
    for key, value in node.items():
        field = model.model_fields.get(key)
        if field is None:
            found.append(f"{path}{key}")
            continue
        for inner in _models(field.annotation):
            items = value if isinstance(value, list) else [value]
            for item in items:
                if isinstance(item, dict):
                    found += unknown_keys(inner, item, f"{path}{key}.")
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def test_serve_knows_every_key(manifests):
    config = serve_config(manifests)
    assert unknown_keys(ServeDeploySchema, config) == []
    ServeDeploySchema.model_validate(config)
    wrong = {**config, "applications": [{**config["applications"][0], "num_replicass": 1}]}
    assert unknown_keys(ServeDeploySchema, wrong) == ["applications.num_replicass"]


def test_what_serve_imports_is_there(manifests):
    config = serve_config(manifests)
    (application,) = config["applications"]
    assert application["name"] == APP_NAME
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert config["grpc_options"]["grpc_servicer_functions"] == GRPC_SERVICERS


def test_the_arguments_are_a_configuration(manifests):
    (application,) = serve_config(manifests)["applications"]
    config = parse_config(application["args"])
    assert config.ingress.port == serve_config(manifests)["http_options"]["port"]
    assert config.ingress.grpc_port == serve_config(manifests)["grpc_options"]["port"]


def test_every_node_has_a_front(manifests):
    # With HeadOnly no worker would ever be ready.
    assert serve_config(manifests)["proxy_location"] == "EveryNode"
