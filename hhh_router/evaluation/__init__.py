"""Offline: measure a bundle on rows it never saw, and write the figures down with their provenance."""
