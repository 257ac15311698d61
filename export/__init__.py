"""Weights as others keep them: this project's runs to Hugging Face checkpoints, and back."""
