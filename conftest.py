"""What cannot be collected everywhere."""

from importlib.util import find_spec

# LiteLLM's own pins do not go together with ours: `make test-litellm` gives it an environment
collect_ignore = [] if find_spec("litellm") else ["hhh_router/interfaces/litellm"]
