"""The gateway: authenticates, validates, tokenizes and queues calls, and delivers their events. No torch."""

import os

# Here, since gRPC reads it when it is imported. On its event engine, the default since 1.80, a server takes a quarter
# more CPU for a call, and its idle threads wake 40 times a second each, beside a model's step as the case may be.
# This is the way back that gRPC's maintainers name; what an operator sets stands.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
