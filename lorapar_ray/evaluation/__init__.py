"""Accuracy on held-out questions, always with its interval."""
