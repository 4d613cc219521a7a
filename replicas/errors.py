"""The error hierarchy. Every message says what happened, to what, and what to do about it."""

from __future__ import annotations


class TokenFlowError(Exception):
    """Root of all errors this package raises on purpose."""


class ConfigError(TokenFlowError):
    """A configuration value is missing, unknown or out of range."""


class CheckpointError(TokenFlowError):
    """A model directory cannot be served: missing file, unknown architecture, dtype or size."""


class InvalidRequestError(TokenFlowError):
    """A request that can never succeed as sent.

    `param` names the offending field, `code` is the machine-readable reason (OpenAI's
    `error.code`).
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class CapacityError(TokenFlowError):
    """The request is valid but cannot be taken now; retry after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaError(CapacityError):
    """The client has used up what it may use for now, however much is free."""


class RequestCancelledError(TokenFlowError):
    """The request was ended early by a call to cancel it."""


class ReaderReplacedError(TokenFlowError):
    """Another connection has gone on with the request of this one."""


class DeadlineExceededError(TokenFlowError):
    """The request's own timeout has passed before it was finished."""


class KVStoreError(TokenFlowError):
    """The node's KV store cannot be created, mapped or used."""


class EngineDeadError(TokenFlowError):
    """The engine loop has stopped; its requests must be resubmitted elsewhere."""


class StepMemoryError(TokenFlowError):
    """The device has not enough memory for a step; a smaller one may do."""
