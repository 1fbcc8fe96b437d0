"""The encoder: blocks, nested vocabulary, pretrained weights, merging and pruning."""
