"""Adapters of low rank (LoRA): their files, their place in memory, and what they add to a model's linear layers."""
