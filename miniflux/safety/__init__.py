"""The content filters of the original repository, which run only where they are asked for."""
