"""A whole training step beside its peers, by stage."""
