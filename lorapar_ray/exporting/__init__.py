"""A finished run as something to take away: an adapter or a merged model, with a card that says how it came about."""
