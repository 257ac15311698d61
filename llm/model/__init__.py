"""The decoder-only Transformer: its shapes, its mathematics, its loss."""
