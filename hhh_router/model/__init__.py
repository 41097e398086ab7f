"""The embedded model: backbone, experts, heads and the mixture. torch lives here and in ``training``."""
