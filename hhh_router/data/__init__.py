"""Readers of data sets, splits, and the prompts the project makes itself. Rows never enter the repository."""
