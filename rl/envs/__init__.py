"""Environments: all of gymnax's behind one wrapper, and our own."""
