"""The dual encoder: its shape, its two towers, and the scale between their embeddings."""
