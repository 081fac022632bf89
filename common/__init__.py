"""What gateway and worker share: job protocol on Redis, settings, errors, model registry. No torch, no gRPC server."""
