"""A finished run behind the OpenAI protocol: base, stage 1, stage 2, and `auto`, which chooses by the question."""
