"""What gateway and worker share: the job protocol on Redis, settings, errors, the model registry. No torch, no gRPC server."""
