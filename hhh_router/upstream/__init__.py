"""Somebody else's model as the generator."""
