"""Text from files to packed batches."""
