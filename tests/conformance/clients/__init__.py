"""Scripts that run in environments of their own; only `probe` may be imported from elsewhere."""
