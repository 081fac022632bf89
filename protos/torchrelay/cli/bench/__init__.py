"""`torchrelay bench`: load on a gateway over gRPC, what was measured of it, and two such runs beside each other."""

from torchrelay.cli.bench.command import bench

__all__ = ["bench"]
