"""Every package is shipped, and the engine stays free of Ray."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("cluster", "replicas", "kvstore", "loadgen")


def test_every_package_is_listed():
    folders = {
        "tokenflow." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP
        for path in (ROOT / top).rglob("__init__.py")
    }
    setuptools = PROJECT["tool"]["setuptools"]
    assert folders == set(setuptools["packages"]) == set(setuptools["package-dir"])
    for name, folder in setuptools["package-dir"].items():
        assert name == "tokenflow." + folder.replace("/", ".")


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
    banned = {"torch", "time", "ray", "os", "asyncio", "threading", "socket", "numpy", "random"}
    for path in (ROOT / "replicas" / "scheduler").glob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & banned, path
