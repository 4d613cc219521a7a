"""TLS before a running cluster: HTTP and gRPC as clients use them, and a renewed certificate."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import grpc
import httpx
import pytest

from tests.support.certificates import make_certificate
from tokenflow.client import Client
from tokenflow.cluster.config import TLSConfig
from tokenflow.cluster.local import HEADER_TIMEOUT_S, free_port
from tokenflow.cluster.tls_front import Route, TLSFront, read_certificate
from tokenflow.replicas.errors import ConfigError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def front(server, tmp_path_factory):
    """A front before the session's cluster: (its TLS files, HTTPS port, gRPC port)."""
    directory = tmp_path_factory.mktemp("tls")
    tls = make_certificate(directory, "first")
    ports = free_port(), free_port()
    ingress = server.config.ingress
    routes = [
        Route("http", "127.0.0.1", ports[0], ingress.port),
        Route("grpc", "127.0.0.1", ports[1], ingress.grpc_port, http2_only=True),
    ]
    running = TLSFront(tls, routes, directory, HEADER_TIMEOUT_S)
    running.start()
    yield tls, *ports
    running.stop()


def presented(port: int) -> str:
    """The certificate that a new connection is shown."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def test_https_and_grpc_over_tls(server, front):
    tls, port, grpc_port = front
    trusted = ssl.create_default_context(cafile=tls.certificate)
    url = f"https://127.0.0.1:{port}"
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 8, "stream": True}
    with httpx.Client(verify=trusted, timeout=30) as client:
        assert client.get(f"{url}/health").status_code == 200
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", verify=ssl.create_default_context())
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{grpc_port}/health")
    credentials = grpc.ssl_channel_credentials(Path(tls.certificate).read_bytes())
    with Client(f"127.0.0.1:{grpc_port}", tls=credentials) as client:
        chunks = list(client.generate("Hello", max_tokens=8, ignore_eos=True))
        assert sum(len(chunk.token_ids) for chunk in chunks) == 8


def test_old_protocols_are_refused(front):
    _, port, _ = front
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)


def test_a_renewed_certificate_is_taken_up_and_streams_go_on(server, front, tmp_path):
    tls, port, _ = front
    before = presented(port)
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 60, "ignore_eos": True}
    body |= {"stream": True, "token_rate": 10}
    trusted = ssl.create_default_context(cafile=tls.certificate)
    with httpx.Client(verify=trusted, timeout=30) as client:
        url = f"https://127.0.0.1:{port}/v1/completions"
        with client.stream("POST", url, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            renewed = make_certificate(tmp_path, "second")
            for name in ("certificate", "key"):
                Path(getattr(tls, name)).write_text(Path(getattr(renewed, name)).read_text())
            deadline = time.monotonic() + 20
            while presented(port) == before:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert presented(port) == Path(renewed.certificate).read_text()


def test_files_that_are_no_certificate_are_refused_with_a_reason(tmp_path):
    one, two = make_certificate(tmp_path, "one"), make_certificate(tmp_path, "two")
    read_certificate(one)
    with pytest.raises(ConfigError, match="no certificate and its key"):
        read_certificate(TLSConfig(certificate=one.certificate, key=two.key))
    with pytest.raises(ConfigError, match=r"security\.tls\.key: cannot read"):
        read_certificate(TLSConfig(certificate=one.certificate, key=str(tmp_path / "none")))
