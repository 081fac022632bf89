"""Faults on real processes, and a checker that decides whether a law was broken."""

import os

# This process starts others all the time; grpc's handlers at a fork crash the child where calls are in progress.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
