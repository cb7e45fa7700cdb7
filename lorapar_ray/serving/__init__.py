"""Serves a finished run with the OpenAI protocol: base, stage 1, stage 2, and `auto`, which chooses by the question."""
