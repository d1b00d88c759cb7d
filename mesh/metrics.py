"""What a gateway counts, in the Prometheus format.

Rule of the file: a registry of its own, so that two gateways in one process (tests) never clash.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST


class GatewayMetrics:
    """The counters of one gateway; `page()` is what ``GET /metrics`` answers."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.cold_requests = Counter(
            "raymesh_cold_requests",
            "Requests that came to the gateway, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        self.cold_seconds = Histogram(
            "raymesh_cold_request_seconds",
            "How long requests that waited for a load took, answer included.",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120),
            registry=self._registry,
        )
        self.placements = Counter(
            "raymesh_placements",
            "Placements asked of the controller, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        self.registrations = Counter(
            "raymesh_registrations", "Models asked to be registered, by outcome.", ["outcome"], registry=self._registry
        )
        self.unregistrations = Counter("raymesh_unregistrations", "unregisterModel calls.", registry=self._registry)
        self.models = Gauge("raymesh_models", "Models registered.", registry=self._registry)
        self.instances = Gauge("raymesh_instances", "Live runtime instances.", registry=self._registry)
        self.routes = Gauge("raymesh_routes", "Models with a route in the front door.", registry=self._registry)

    def page(self) -> bytes:
        """All of them in the text format."""
        return generate_latest(self._registry)
