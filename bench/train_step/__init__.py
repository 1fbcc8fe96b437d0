"""A whole training step next to its peers, by stage."""
