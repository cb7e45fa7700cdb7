"""Exports a finished run: an adapter or a merged model, with a model card."""
