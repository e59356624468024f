"""Attacks that look for the nearest misclassified image, one module per algorithm."""
