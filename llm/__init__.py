"""The language model: tokenizer, data, model, training, generation, evaluation."""
