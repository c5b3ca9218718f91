"""The configuration of a run: its schema, and reading it from YAML files and overrides."""
