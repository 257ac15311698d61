"""Where images with captions come from: one module a kind of place."""
