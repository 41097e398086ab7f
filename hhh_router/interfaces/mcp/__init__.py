"""A proxy in front of MCP servers, which asks the policy about calls of tools and about what comes back."""
