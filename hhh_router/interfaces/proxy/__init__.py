"""The sidecar: a door that stands before somebody else's model. The app changes its base URL, nothing else."""
