"""What one ingress counts of its clients' requests, for `GET /metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from tokenflow.replicas.stats import TTFT_BUCKETS_S

DURATION_BUCKETS_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

# Counters would come with a gauge of when they began, which nothing here asks for.
disable_created_metrics()


class IngressMetrics:
    """Series of one ingress, told apart by its id. `registry` holds them."""

    def __init__(self, ingress_id: str) -> None:
        self.registry = CollectorRegistry()
        self._ingress_id = ingress_id
        self._ended = Counter(
            "tokenflow_ingress_requests",
            "Client requests ended, by HTTP status or gRPC code; 499 and CANCELLED: the client "
            "left.",
            ["ingress", "api", "status"],
            registry=self.registry,
        )
        self._ttft = Histogram(
            "tokenflow_ingress_time_to_first_token_seconds",
            "From a client request's arrival at the ingress to its first token.",
            ["ingress", "api"],
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._duration = Histogram(
            "tokenflow_ingress_request_seconds",
            "From a client request's arrival at the ingress to its end.",
            ["ingress", "api"],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )

        self._keys_stale = Gauge(
            "tokenflow_ingress_keys_stale",
            "1 while the file of API keys cannot be used: the keys are those it had before.",
            ["ingress"],
            registry=self.registry,
        ).labels(ingress_id)

    def keys_stale(self, stale: bool) -> None:
        """Whether changes of the file of API keys go unheard."""
        self._keys_stale.set(stale)

    def ended(self, api: str, status: str, seconds: float) -> None:
        """A request has ended. `api` and `status` are of small fixed sets."""
        self._ended.labels(self._ingress_id, api, status).inc()
        self._duration.labels(self._ingress_id, api).observe(seconds)

    def first_token(self, api: str, seconds: float) -> None:
        self._ttft.labels(self._ingress_id, api).observe(seconds)
