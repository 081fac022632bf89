"""What a gateway tells of its calls, streams and queues, and of the spans that they are part of."""
