"""The operators' services, each on the admin port and behind a scope of its own."""
