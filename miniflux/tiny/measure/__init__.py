"""What the tiny FLUX can do: a judge, tables of rates, a gallery."""
