"""Dashboard and alerts against a real Prometheus that scrapes a running system."""
