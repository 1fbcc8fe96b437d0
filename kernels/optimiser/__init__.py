"""Updates of the weights."""
