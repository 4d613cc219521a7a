"""Certificates that sign themselves."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tokenflow.cluster.config import TLSConfig


def make_certificate(directory: Path, name: str) -> TLSConfig:
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return TLSConfig(certificate=str(certificate), key=str(key))
