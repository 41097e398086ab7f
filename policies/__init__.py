"""The policies shipped with the package, as YAML."""
