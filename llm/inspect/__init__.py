"""What a model makes of a text: attention maps, logit lens, next-token probabilities, surprisal."""

LONGEST = 128  # tokens that the pictures can show
