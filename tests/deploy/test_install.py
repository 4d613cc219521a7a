"""Install, upgrade, roll back and uninstall, by real Helm against an API in memory that takes valid
objects only."""

from __future__ import annotations

import pytest
import yaml

from tests.support.charts import CHART, EVERYTHING, RELEASE, RenderError, helm3, one, read, render4
from tests.support.fake_kubernetes import FakeKubernetes, serving
from tests.support.handbook import ROOT, commands, words

SERVICE = ("RayService", "everything")
NAMESPACE = ["--namespace", "readers"]


@pytest.fixture
def cluster(tmp_path):
    kubernetes = FakeKubernetes()
    with serving(kubernetes) as address:
        context = {"cluster": "fake", "user": "fake"}
        (tmp_path / "config").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "fake", "cluster": {"server": address}}],
                    "users": [{"name": "fake", "user": {}}],
                    "contexts": [{"name": "fake", "context": context}],
                    "current-context": "fake",
                }
            )
        )
        kubernetes.flags = ["--kubeconfig", str(tmp_path / "config")]
        yield kubernetes


def change(cluster: FakeKubernetes, verb: str, values: dict) -> None:
    # There is no OpenAPI to ask; the objects are validated as they come in.
    flags = [*cluster.flags, *NAMESPACE, "--disable-openapi-validation", "--values", "-"]
    helm3(verb, RELEASE, str(CHART), *flags, stdin=yaml.safe_dump(values))


def test_a_release_from_its_beginning_to_its_end(cluster):
    values = read(EVERYTHING)
    change(cluster, "install", values)
    kinds = {m["kind"] for m in render4(values)} - {"Pod"}  # the pod is a test's
    assert cluster.of_chart() == kinds and not cluster.refused
    first = cluster.objects[SERVICE]["spec"]
    assert first == one(render4(values), "RayService")["spec"]

    values["config"]["replicas"]["count"] = 2
    values["podMonitor"]["enabled"] = False
    change(cluster, "upgrade", values)
    second = cluster.objects[SERVICE]["spec"]
    assert second == one(render4(values), "RayService")["spec"] != first
    assert second["rayClusterConfig"] == first["rayClusterConfig"]
    assert cluster.of_chart() == kinds - {"PodMonitor"}

    values["config"]["replicas"]["count"] = 0
    with pytest.raises(RenderError, match="count"):
        change(cluster, "upgrade", values)
    assert cluster.objects[SERVICE]["spec"] == second

    helm3("rollback", RELEASE, "1", *cluster.flags, *NAMESPACE)
    assert cluster.objects[SERVICE]["spec"] == first
    assert cluster.of_chart() == kinds
    history = yaml.safe_load(
        helm3("history", RELEASE, "--output", "yaml", *cluster.flags, *NAMESPACE)
    )
    assert [entry["status"] for entry in history][-1] == "deployed"

    helm3("uninstall", RELEASE, *cluster.flags, *NAMESPACE)
    assert cluster.of_chart() == set() and not cluster.refused


VERBS = ("install", "upgrade", "history", "rollback")
TYPED = [
    typed[1:]
    for _, command in commands()
    if (typed := words(command))[0] == "helm" and {"tokenflow", "llm"} <= set(typed)
]
"""What the handbook tells to type about its release, in its order."""


def test_what_the_handbook_types(cluster):
    done = []
    for typed in TYPED:
        verb = next((word for word in typed if word in VERBS), None)
        if verb is None:  # its test needs pods
            continue
        # A namespace would be checked against the OpenAPI, which is not there.
        typed = [word for word in typed if word != "--create-namespace"]
        flags = [*cluster.flags]
        if verb in ("install", "upgrade"):
            flags.append("--disable-openapi-validation")
        helm3(*(str(ROOT / w) if w.startswith("deploy/") else w for w in typed), *flags)
        assert ("RayService", "tokenflow") in cluster.objects and not cluster.refused
        done.append(verb)
    assert tuple(done) == VERBS


def test_what_is_not_valid_is_not_installed(cluster):
    values = read(EVERYTHING)
    values["workerDefaults"]["tolerations"] = [{"keyy": "gpu"}]
    with pytest.raises(RenderError, match="keyy"):
        change(cluster, "install", values)
    assert cluster.refused
