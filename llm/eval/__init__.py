"""Measures of a trained model. Each is a function of the model and data that training can call."""
