"""Images with captions: sources, splits, decoding, augmentation, and batches as a function of their number."""
