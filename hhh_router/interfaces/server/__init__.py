"""The HTTP door: OpenAI's wire and our own, on Starlette."""
