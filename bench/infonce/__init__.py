"""The contrastive loss beside eager, compiled and other packages."""
