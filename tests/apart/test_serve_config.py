"""The Serve configuration that the chart renders really starts: handed to Ray's dashboard as
KubeRay does it, with token authentication, and read from over HTTP and gRPC."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml

from tests.support.charts import EXAMPLES, one, read, render4
from tests.support.ray_head import RayHead, ray_head
from tokenflow.cluster.app import APP_NAME
from tokenflow.cluster.local import free_port
from tokenflow.cluster.rpc import inference_pb2 as pb
from tokenflow.cluster.rpc.stub import InferenceStub

pytestmark = pytest.mark.cluster
MODEL = "tokenflow-books"


@dataclass
class Served:
    head: RayHead
    values: dict[str, Any]
    store: Path

    @property
    def http_port(self) -> int:
        return self.values["config"]["ingress"]["port"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def text(self) -> str:
        """spec.serveConfigV2 of the rendered chart."""
        text: str = one(render4(self.values), "RayService")["spec"]["serveConfigV2"]
        return text

    def put(self) -> None:
        """What KubeRay's operator does with it."""
        body = json.dumps(yaml.safe_load(self.text))
        answer = self.head.call("PUT", "/api/serve/applications/", content=body)
        assert answer.status_code == 200, answer.text
        self.head.wait_until_served(APP_NAME)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    # A pod's /kv is a file system in memory; here a folder in one stands for it.
    store = Path(tempfile.mkdtemp(prefix="tf-kv-", dir="/dev/shm"))
    values = read(EXAMPLES / "kind-cpu.yaml")
    values["config"]["ingress"] = {"port": free_port(), "grpc_port": free_port()}
    values["serveConfig"] = {"http_options": {"host": "127.0.0.1"}}  # not to the whole network
    values["kvStore"] = {"size": "64Mi", "mountPath": str(store)}
    try:
        with ray_head() as head:
            running = Served(head, values, store)
            running.put()
            yield running
    finally:
        shutil.rmtree(store, ignore_errors=True)


def test_a_stream_over_http(served):
    body = {"model": MODEL, "prompt": "The sea", "max_tokens": 24, "stream": True}
    with (
        httpx.Client(trust_env=False, timeout=60) as client,
        client.stream("POST", f"{served.url}/v1/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        events = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    text = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-1])
    assert len(text) > 20


def test_a_stream_over_grpc(served):
    target = f"127.0.0.1:{served.values['config']['ingress']['grpc_port']}"
    sampling = pb.SamplingParams(max_tokens=24, ignore_eos=True)
    with grpc.insecure_channel(target) as channel:
        request = pb.GenerateRequest(model=MODEL, text="The sea", sampling=sampling)
        messages = list(InferenceStub(channel).Generate(request, timeout=60))
    assert sum(len(message.token_ids) for message in messages) == 24
    assert messages[-1].usage.completion_tokens == 24


def test_the_store_lies_in_its_volume(served):
    (segment,) = served.store.glob("tokenflow-kv-*")
    # With its tables it fits in a volume of the size that the chart gives it.
    assert 0 < segment.stat().st_size <= 64 << 20


def test_what_kuberay_probes(served):
    """The commands of the readiness probe of its workers, and their liveness probe."""
    with httpx.Client(trust_env=False, timeout=10) as client:
        assert "success" in client.get(f"{served.head.agent}/api/local_raylet_healthz").text
        assert "success" in client.get(f"{served.url}/-/healthz").text
        assert client.get(f"{served.head.agent}/api/healthz").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/version"),
        ("GET", "/api/serve/applications/"),
        ("PUT", "/api/serve/applications/"),
        ("POST", "/api/jobs/"),
    ],
)
def test_without_the_token_the_dashboard_refuses(served, method, path):
    assert served.head.call(method, path, token=False, json={}).status_code == 401


def test_a_change_of_the_configuration_is_applied_in_place(served, tmp_path):
    """By Serve's own command, as without Kubernetes."""
    before = served.text
    served.values["config"]["limits"] = {"max_choices": 3}
    assert served.text != before
    (tmp_path / "serve.yaml").write_text(served.text)
    served.head.serve_deploy(tmp_path / "serve.yaml")
    body = {"model": MODEL, "prompt": "The sea", "max_tokens": 1, "n": 4}
    with httpx.Client(trust_env=False, timeout=60) as client:
        refused = client.post(f"{served.url}/v1/completions", json=body)
    assert refused.status_code == 400 and "3" in refused.text
