"""The worker: claims jobs from Redis when its KV cache has room, decodes them together, commits their tokens."""
