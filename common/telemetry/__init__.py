"""What a process tells of itself: metrics and probes over HTTP, spans, log levels."""
