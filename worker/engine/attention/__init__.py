"""Attention over the paged KV cache: one small interface, a torch back-end that is the oracle, a C++ one for CPUs."""
