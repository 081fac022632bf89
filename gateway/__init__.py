"""The gateway: authenticates, validates, tokenizes and queues calls, and delivers their events. No torch."""
