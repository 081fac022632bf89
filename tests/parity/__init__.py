"""The engine against transformers' own `generate`, parameter by parameter: `make parity`, and a small one as a test."""
