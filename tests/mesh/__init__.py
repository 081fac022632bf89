"""Two gateways behind a real Envoy, as in a mesh: mutual TLS, forwarded certificates, retries, gateways that die."""
