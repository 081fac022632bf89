"""All metrics of one gateway, in one registry."""

from __future__ import annotations

from collections.abc import Sized
from importlib.metadata import version

from prometheus_client import Gauge

from common.settings import MetricsSettings
from common.telemetry.monitor import process_registry
from common.telemetry.upkeep import UpkeepCounters
from gateway.telemetry.calls import GrpcMeter, OpenAiMeter, TenantCalls
from gateway.telemetry.queues import QueueFigures
from gateway.telemetry.streams import StreamMetrics


class GatewayMetrics:
    """What the parts of a gateway count with."""

    def __init__(self, settings: MetricsSettings) -> None:
        self.registry = process_registry()
        tenants = TenantCalls(self.registry, settings.max_tenants)
        self.grpc = GrpcMeter(self.registry, tenants)
        self.openai = OpenAiMeter(self.registry, tenants)
        self.streams = StreamMetrics(self.registry)
        self.upkeep = UpkeepCounters(self.registry)
        self.queues = QueueFigures()
        self.registry.register(self.queues)
        info = Gauge("torchrelay_gateway_info", "This gateway; always 1.", ["version"], registry=self.registry)
        info.labels(version("torchrelay")).set(1)

    def count_open(self, streams: Sized, batches: Sized) -> None:
        """Tell, whenever asked, how many there are."""
        for name, text, things in (
            ("streams_open", "Calls that listen to a generation.", streams),
            ("batches_fed", "Batches that this gateway feeds.", batches),
        ):
            Gauge(f"torchrelay_{name}", text, registry=self.registry).set_function(things.__len__)
