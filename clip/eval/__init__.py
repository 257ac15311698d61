"""Measures of an image-text model. Each is a function of embeddings, or of the model and data, that training
can call.
"""
