"""A Kubernetes API in memory, enough for `helm install`, `upgrade`, `rollback` and `uninstall`:
discovery, and objects by kind. What is written is validated as strictly as tests/support/manifests
does it, patches after they are applied. No controllers: nothing ever runs."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from tests.support.manifests import problems

Object = dict[str, Any]
RESOURCES = {
    "v1": {"configmaps": "ConfigMap", "pods": "Pod", "secrets": "Secret", "services": "Service"}
    | {"serviceaccounts": "ServiceAccount"},
    "networking.k8s.io/v1": {"ingresses": "Ingress", "networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "ray.io/v1": {"rayservices": "RayService"},
    "gateway.networking.k8s.io/v1": {"httproutes": "HTTPRoute", "grpcroutes": "GRPCRoute"},
    "monitoring.coreos.com/v1": {
        "podmonitors": "PodMonitor",
        "prometheusrules": "PrometheusRule",
    },
}
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_PATH = re.compile(r"/(?:api/(v1)|apis/([^/]+/[^/]+))/namespaces/([^/]+)/([a-z]+)(?:/([^/]+))?")


class FakeKubernetes:
    """The objects, by (kind, name), of its only namespace."""

    def __init__(self, version: str = "v1.34.0") -> None:
        self.version = version
        self.objects: dict[tuple[str, str], Object] = {}
        self.refused: list[str] = []
        """What was wrong with each write that was refused."""
        self.flags: list[str] = []
        """Flags with which helm comes here."""
        self._revision = 0

    def of_chart(self) -> set[str]:
        """Kinds that are there, without Helm's own records."""
        return {kind for kind, _ in self.objects} - {"Secret"}

    def answer(self, method: str, path: str, query: Object, body: Any) -> tuple[int, Object]:
        """(status, body) of one request."""
        if path == "/version":
            return 200, {"major": "1", "minor": "34", "gitVersion": self.version}
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()}
        for group, kinds in RESOURCES.items():
            if path == ("/api/v1" if group == "v1" else f"/apis/{group}"):
                return 200, _resources(group, kinds)
        found = _PATH.fullmatch(path)
        if found is None:
            return _status(404, "NotFound", path)
        group, resource, name = found[1] or found[2], found[4], found[5]
        kind = RESOURCES.get(group, {}).get(resource)
        if kind is None:
            return _status(404, "NotFound", resource)
        if name is None:
            return self._list(kind, group, query) if method == "GET" else self._create(body)
        return self._one(method, (kind, name), body)

    def _list(self, kind: str, group: str, query: Object) -> tuple[int, Object]:
        wanted = dict(
            part.split("=", 1)
            for text in query.get("labelSelector", ())
            for part in text.split(",")
        )
        items = [
            one
            for (own, _), one in self.objects.items()
            if own == kind and wanted.items() <= one["metadata"].get("labels", {}).items()
        ]
        meta = {"resourceVersion": str(self._revision)}
        return 200, {"kind": f"{kind}List", "apiVersion": group, "metadata": meta, "items": items}

    def _create(self, body: Object) -> tuple[int, Object]:
        if (body["kind"], body["metadata"]["name"]) in self.objects:
            return _status(409, "AlreadyExists", body["metadata"]["name"])
        return self._save(201, body)

    def _one(self, method: str, key: tuple[str, str], body: Any) -> tuple[int, Object]:
        if key not in self.objects:
            return _status(404, "NotFound", "/".join(key))
        if method == "GET":
            return 200, self.objects[key]
        if method == "DELETE":
            del self.objects[key]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        changed = body if method == "PUT" else _merged(self.objects[key], body)
        return self._save(200, changed)

    def _save(self, code: int, one: Object) -> tuple[int, Object]:
        wrong = [] if one["kind"] == "Secret" else problems(one)
        if wrong:
            self.refused += wrong
            return _status(422, "Invalid", "; ".join(wrong))
        self._revision += 1
        meta = one["metadata"]
        meta.setdefault("uid", str(uuid.uuid4()))
        meta["resourceVersion"] = str(self._revision)
        self.objects[one["kind"], meta["name"]] = one
        return code, one


def _merged(one: Any, patch: Any) -> Any:
    """RFC 7386. Helm sends built-in kinds a strategic patch: for what is changed here, the same."""
    if not isinstance(patch, dict) or not isinstance(one, dict):
        return patch
    kept = {key: value for key, value in one.items() if patch.get(key, value) is not None}
    changed = {k: _merged(one.get(k), v) for k, v in patch.items() if v is not None}
    return kept | changed


def _status(code: int, reason: str, message: str) -> tuple[int, Object]:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return code, status | {"reason": reason, "message": message, "code": code}


def _groups() -> list[Object]:
    groups = []
    for group in RESOURCES:
        if "/" in group:
            name, version = group.split("/")
            preferred = {"groupVersion": group, "version": version}
            groups.append({"name": name, "versions": [preferred], "preferredVersion": preferred})
    return groups


def _resources(group: str, kinds: dict[str, str]) -> Object:
    listed = [
        {
            "name": name,
            "singularName": kind.lower(),
            "kind": kind,
            "namespaced": True,
            "verbs": _VERBS,
        }
        for name, kind in kinds.items()
    ]
    answer = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group}
    return answer | {"resources": listed}


@contextlib.contextmanager
def serving(kubernetes: FakeKubernetes) -> Iterator[str]:
    """Its address."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Not on the tests' output."""

        def _any(self) -> None:
            url = urlparse(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            with lock:
                path = url.path.rstrip("/")
                code, answer = kubernetes.answer(self.command, path, parse_qs(url.query), body)
                data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
