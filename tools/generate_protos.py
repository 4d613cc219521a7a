"""Regenerates `cluster/rpc/inference_pb2.py` and its types from `inference.proto`.

    pip install "grpcio-tools==1.74.0" && python tools/generate_protos.py

That version's code runs with every protobuf from 6.31 on; a newer generator would raise the floor.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
# The links in typings-root give the proto its import path, and the output its place.
INCLUDE = ROOT / "typings-root"
PROTO = INCLUDE / "tokenflow" / "cluster" / "rpc" / "inference.proto"


def main() -> int:
    code: int = protoc.main(
        [
            "protoc",
            f"-I{INCLUDE}",
            f"--python_out={INCLUDE}",
            f"--pyi_out={INCLUDE}",
            str(PROTO),
        ]
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
