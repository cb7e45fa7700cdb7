"""Labelling: teachers vote which System a question belongs to."""
