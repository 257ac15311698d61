"""Images and captions in one space: a dual encoder, contrastive training, zero-shot classification."""
