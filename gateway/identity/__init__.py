"""Who calls: from a call's metadata, certificate or proxy to a tenant with rights."""
