"""The contrastive loss next to eager, compiled and other packages."""
