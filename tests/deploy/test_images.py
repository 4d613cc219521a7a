"""Dockerfiles, locks and the files for one machine or a Ray cluster without Kubernetes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from tests.deploy.test_kuberay_rules import unknown_keys
from tests.support.charts import ROOT, read
from tests.support.missing import missing
from tokenflow.cluster.app import GRPC_SERVICERS
from tokenflow.cluster.config import parse_config
from tokenflow.cluster.local import SERVE_ENVIRONMENT

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "images").glob("*.Dockerfile"))
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)", re.MULTILINE)


def pins(path: Path) -> dict[str, str]:
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in PIN.findall(path.read_text())
    }


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint(dockerfile):
    command = [str(Path(sys.executable).with_name("hadolint")), str(dockerfile)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_pinned_and_not_root(dockerfile):
    text = dockerfile.read_text()
    bases = re.findall(r"^ARG \w+_IMAGE=(\S+)", text, re.MULTILINE)
    assert bases and all(re.search(r":\d+\.\d+\.\d+", base) for base in bases)
    assert re.findall(r"^USER (.*)", text, re.MULTILINE)[-1] == "1000:1000"
    lock = f"requirements-{dockerfile.name.split('.')[0]}.txt"
    assert f"--require-hashes -r /build/{lock}" in text
    # What KubeRay's probes run.
    assert re.search(r"install -y .*\bbash\b.*\bwget\b", text)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_locks_have_what_the_tests_ran_with(kind):
    """After a change of constraints.txt: the command at the top of deploy/images/README.md."""
    locked, tested = (
        pins(DEPLOY / "images" / f"requirements-{kind}.txt"),
        pins(ROOT / "constraints.txt"),
    )
    different = {name: (v, tested[name]) for name, v in locked.items() if tested.get(name, v) != v}
    assert different == {}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^  "([a-z0-9-]+)(?:\[\w+\])?>=', project.split("[project.opt")[0], re.M)
    assert set(wanted) - set(locked) == (set() if kind == "gpu" else {"torch"})
    assert "opentelemetry-exporter-otlp-proto-http" in locked  # the extra `otel`


def test_the_chart_names_the_ray_that_is_in_the_images():
    """KubeRay takes its word for it."""
    values = read(DEPLOY / "helm" / "tokenflow" / "values.yaml")
    for kind in ("cpu", "gpu"):
        assert pins(DEPLOY / "images" / f"requirements-{kind}.txt")["ray"] == values["rayVersion"]


def test_the_cpu_image_has_the_torch_that_the_tests_ran_with():
    text = (DEPLOY / "images" / "cpu.Dockerfile").read_text()
    assert f"ARG TORCH_VERSION={pins(ROOT / 'constraints.txt')['torch']}+cpu" in text


def test_the_log_is_of_a_build_of_this_lock():
    """And of a run that served. Made anew as deploy/images/README.md says."""
    log = (DEPLOY / "images" / "cpu-build.txt").read_text()
    line = max(re.findall(r"^Successfully installed (.*)$", log, re.MULTILINE), key=len)
    found = [re.fullmatch(r"(.*?)-(\d.*)", word).groups() for word in line.split()]
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}
    assert installed == pins(DEPLOY / "images" / "requirements-cpu.txt")
    assert re.search(r"^build rc 0$", log, re.MULTILINE)
    assert re.search(r"^smoke test passed$", log, re.MULTILINE) and log.endswith("smoke rc 0\n")


def test_the_context_has_what_is_copied():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for dockerfile in DOCKERFILES:
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile.read_text(), re.MULTILINE):
            for source in line.split():
                assert (ROOT / source).exists()
                pattern = re.sub(r"requirements-\w+", "requirements-*", source)
                assert f"!{pattern}" in ignored


def test_compose_serves_a_right_configuration():
    compose = read(DEPLOY / "compose" / "compose.yaml")
    service = compose["services"]["tokenflow"]
    assert (
        DEPLOY / "compose" / service["build"]["context"] / service["build"]["dockerfile"]
    ).exists()
    config = parse_config(read(DEPLOY / "compose" / "tokenflow.yaml"))
    assert config.ingress.host == "0.0.0.0"
    assert [port.split(":")[-1] for port in service["ports"]] == [
        str(config.ingress.port),
        str(config.ingress.grpc_port),
    ]
    gpu = read(DEPLOY / "compose" / "gpu.yaml")["services"]["tokenflow"]
    assert set(gpu) - {"deploy"} <= set(service)


def test_serve_yaml_is_what_serve_takes():
    config = read(DEPLOY / "ray" / "serve.yaml")
    assert unknown_keys(ServeDeploySchema, config) == []
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    parse_config(application["args"])
    assert config["grpc_options"]["grpc_servicer_functions"] == GRPC_SERVICERS


def environment_file() -> dict[str, str]:
    """What a shell makes of it."""
    script = f"set -a; . {DEPLOY / 'ray' / 'tokenflow.env'}; exec env -0"
    done = subprocess.run(["bash", "-c", script], env={}, capture_output=True, text=True, timeout=9)
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {key: value for key, value in found.items() if key.startswith("RAY_")}


def test_the_environment_is_that_of_tokenflow_serve():
    assert environment_file() == {**SERVE_ENVIRONMENT, "RAY_AUTH_MODE": "token"}


def test_ray_takes_the_cluster_yaml():
    cluster = read(DEPLOY / "ray" / "cluster.yaml")
    for source in cluster["file_mounts"].values():
        assert (ROOT / source).exists()
    validate_config(prepare_config(cluster))
    with pytest.raises(Exception, match="unexpected"):
        validate_config({**prepare_config(cluster), "max_worker": 1})


def test_systemd_takes_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        missing("systemd-analyze is not installed", in_ci=False)
    text = (DEPLOY / "systemd" / "tokenflow.service").read_text()
    unit = tmp_path / "tokenflow.service"
    # The program lies elsewhere on this machine; systemd looks whether it is there.
    unit.write_text(text.replace("/opt/tokenflow/bin/tokenflow", sys.executable))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    own = [line for line in done.stderr.splitlines() if "tokenflow.service" in line]
    assert (done.returncode, own) == (0, [])
    flags = re.search(r"^ExecStart=\S+ (.*)", text, re.MULTILINE)
    assert flags is not None and flags[1].split()[:2] == ["serve", "--config"]


def test_every_yaml_of_deploy_is_yaml():
    found = [p for p in DEPLOY.rglob("*.yaml") if "templates" not in p.parts]
    assert len(found) >= 8
    for path in found:
        list(yaml.safe_load_all(path.read_text()))
