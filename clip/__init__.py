"""Image and text towers, contrastive training, zero-shot classification."""
