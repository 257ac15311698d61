"""What a model makes of a text: attention maps, logit lens, next-token probabilities, surprisal."""
