"""Every package is shipped, and the engine stays free of Ray."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("cluster", "replicas", "kvstore", "loadgen")
RENAMED = {"cluster.client": "client"}
"""Folders whose import name is not their path."""


def test_every_package_is_listed():
    folders = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP
        for path in (ROOT / top).rglob("__init__.py")
    ]
    names = {f"tokenflow.{RENAMED.get(folder, folder)}": folder for folder in folders}
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(names) == set(setuptools["packages"])
    assert setuptools["package-dir"] == {n: f.replace(".", "/") for n, f in names.items()}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_engine_never_imports_ray():
    for path in (ROOT / "replicas").rglob("*.py"):
        assert not {n for n in imports(path) if n.split(".")[0] == "ray"}, path


def test_ray_appears_only_in_the_store_actor_and_the_cluster():
    for top in ("kvstore", "loadgen"):
        for path in (ROOT / top).rglob("*.py"):
            if path.name in ("actor.py",):
                continue
            assert not {n for n in imports(path) if n.split(".")[0] == "ray"}, path


def test_policies_know_no_torch_no_clock_no_io():
    banned = {"torch", "time", "ray", "os", "asyncio", "threading", "socket", "random"}
    for path in (ROOT / "replicas" / "scheduler").glob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & banned, path


def test_the_wheel_has_the_model_and_the_protos_and_no_tests(tmp_path):
    source = tmp_path / "source"
    for name in (*TOP, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    model = "tokenflow/replicas/models/tokenflow-books/"
    for file in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert model + file in names
    assert "tokenflow/cluster/rpc/inference.proto" in names
    assert "tokenflow/cluster/cli.py" in names
    assert "tokenflow/loadgen/schemas/report.schema.json" in names
    assert not {name for name in names if "tests/" in name or "/test_" in name}
    assert not {name for name in names if name.startswith("tools")}


def test_the_embedded_model_is_small():
    folder = ROOT / "replicas" / "models" / "tokenflow-books"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 << 20
