"""What every call passes: errors become statuses, bytes become messages, credentials become a caller."""
