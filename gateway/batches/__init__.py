"""Batches: many requests at once, made of a stream, fed into the queue as there is room, read as a stream."""
