"""From files to networks: formats (bytes -> tensors), names (their names -> ours), layouts (which
file is what)."""
