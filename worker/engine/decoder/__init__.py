"""Llama-shaped decoders on the CPU: a whole step in one call of C++, with weights packed once."""
