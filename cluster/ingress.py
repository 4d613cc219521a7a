"""The ingress deployment: the doors of the cluster, HTTP (OpenAI-compatible) and gRPC.

It checks, tokenizes, opens streams and frames the answers. What a request may look like is in
`api/` and `rpc/`, what a stream is in `streams.py`; here the two meet.
"""

from __future__ import annotations

import logging

from fastapi import FastAPI

logger = logging.getLogger("ray.serve")

app = FastAPI(title="TokenFlow", docs_url=None, redoc_url=None, openapi_url=None)

_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_LONG_PROMPT_CHARS = 4096
"""Longer prompts are tokenized on a worker thread, so that other streams keep flowing."""
