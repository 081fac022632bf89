"""The OpenAI door: completions, chat completions and models over HTTP, by the same code, keys and limits as gRPC."""
