"""How a model runs, never what it computes."""
