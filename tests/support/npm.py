"""npm packages for tests, installed by their lock file into the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.support.missing import missing

_INSTALL_TIMEOUT_S = 120


@cache
def installed(lock_folder: Path, *, in_ci: bool = False) -> Path:
    """The folder with `node_modules` of the package.json and package-lock.json in `lock_folder`.
    Skips the test, with the reason, where they cannot be had; with `in_ci`, CI must have them."""
    npm = shutil.which("npm")
    if npm is None:
        missing("npm is not installed", in_ci=in_ci)
    lock = (lock_folder / "package-lock.json").read_bytes()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenflow-tests"
    folder = base / f"{lock_folder.name}-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.exists():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            made = Path(scratch) / "packages"
            made.mkdir()
            for name in ("package.json", "package-lock.json"):
                shutil.copy(lock_folder / name, made)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            try:
                subprocess.run(
                    command, cwd=made, check=True, capture_output=True, timeout=_INSTALL_TIMEOUT_S
                )
            except subprocess.CalledProcessError as error:
                reason = error.stderr.decode(errors="replace")[:300]
                missing(f"npm ci failed: {reason}", in_ci=in_ci)
            except subprocess.TimeoutExpired:
                missing(f"npm ci took more than {_INSTALL_TIMEOUT_S} s", in_ci=in_ci)
            if not folder.exists():
                made.rename(folder)
    return folder
