"""CLIP: an image and a text tower whose embeddings meet in one space; training, retrieval, zero-shot."""
