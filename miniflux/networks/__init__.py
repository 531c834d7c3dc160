"""One network, one file. These modules know only torch and each other."""
