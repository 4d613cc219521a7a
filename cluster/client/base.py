"""What both clients share: addresses, credentials, requests, a stream's figures. Sends nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as Seq
from typing import Any

import grpc

from tokenflow.client.errors import DeadlineExceeded, InvalidRequest
from tokenflow.client.pacing import Pacer
from tokenflow.client.requests import Options, Prompt, Rate, checked_rate, generate_request
from tokenflow.client.session import Retries, Session
from tokenflow.client.types import Usage
from tokenflow.cluster.rpc import inference_pb2 as pb

UNARY_TIMEOUT_S = 10.0


class BaseClient:
    """`Client` and `AsyncClient` say what the parameters are."""

    def __init__(
        self,
        target: str | Seq[str],
        *,
        token_rate: Rate | None = None,
        api_key: str | None = None,
        tls: bool | grpc.ChannelCredentials = False,
        metadata: Seq[tuple[str, str]] = (),
        retries: Retries | None = None,
        channel_options: Seq[tuple[str, Any]] = (),
    ) -> None:
        """Connects with the first call.

        Args:
            target: `host:port` of the gRPC endpoint, or several; a lost stream goes on at the next.
            token_rate: Tokens/s of the streams that do not say; "max" = no reader.
            api_key: Sent as `authorization: Bearer ...`.
            tls: True for TLS with the system's certificates, or credentials of one's own.
            metadata: Sent with every call.
            retries: How hard to try.
            channel_options: gRPC's own.

        Raises:
            InvalidRequest: no target, or no rate.
        """
        self._addresses = (target,) if isinstance(target, str) else tuple(target)
        if not self._addresses or not all(self._addresses):
            raise InvalidRequest("target: an address (host:port) is needed.")
        self._rate = token_rate
        if token_rate is not None:
            checked_rate(token_rate)
        self._credentials = grpc.ssl_channel_credentials() if tls is True else (tls or None)
        self._metadata = tuple(metadata)
        if api_key is not None:
            self._metadata += (("authorization", f"Bearer {api_key}"),)
        self._retries = retries or Retries()
        self._options = list(channel_options)
        self._target = 0
        """Index of the address that answered last."""

    def _new_session(
        self, prompt: Prompt, rate: Rate | None, resumable: bool, options: Options
    ) -> Session:
        request = generate_request(prompt, token_rate=rate, resumable=resumable, **options)
        return self._session(request, request.request_id)

    def _session(
        self, request: pb.GenerateRequest | None, request_id: str, offset: int = 0
    ) -> Session:
        return Session(
            request,
            request_id=request_id,
            offset=offset,
            targets=len(self._addresses),
            first_target=self._target,
            retries=self._retries,
        )


class BaseStream:
    """The figures of a stream."""

    def __init__(self, session: Session, rate: Rate | None, timeout_s: float | None) -> None:
        self._session = session
        self._rate = rate
        self._deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._call: Any = None
        self._asked = False
        """Whether the server may know of the request."""
        self._pacer: Pacer | None = None

    @property
    def request_id(self) -> str:
        return self._session.request_id

    @property
    def finish_reason(self) -> str | None:
        """ "stop" or "length"; None while there is more to come."""
        return self._session.finish_reason

    @property
    def usage(self) -> Usage | None:
        """Known at the end."""
        return self._session.usage

    @property
    def received(self) -> int:
        """Tokens that have arrived."""
        return self._session.received

    @property
    def reconnects(self) -> int:
        """How often it went on after a lost connection."""
        return self._session.reconnects

    @property
    def pacer(self) -> Pacer | None:
        """Of `paced()`: what lies ready, and how often the reader had to wait."""
        return self._pacer

    def _time_left_s(self) -> float | None:
        """As gRPC takes a time-out. Raises DeadlineExceeded."""
        if self._deadline == math.inf:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"Time is over after {self.received} tokens.")
        return left


def reading_rate(rate: Rate | None, default: float) -> float:
    """Tokens/s of a reader, infinite for none; `default` when nothing was declared."""
    return default if rate is None else checked_rate(rate)
