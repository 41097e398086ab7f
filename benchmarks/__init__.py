"""How fast the embedded engine is beside what it could be compared with; docs/benchmarks.md says how to read it."""
