"""Images with captions: sources, splits, decoding, augmentation, and batches by number."""
