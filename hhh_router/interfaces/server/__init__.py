"""interfaces/server."""
