"""The tasks of encoder models: EmbeddingService, ClassificationService and OpenAI's embeddings over the same queue."""
