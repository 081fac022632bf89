"""The command `torchrelay`. Verbs of the server join through entry points when the server is installed."""
