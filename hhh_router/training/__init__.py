"""Offline: train experts and heads, fit calibrators, write a bundle."""
