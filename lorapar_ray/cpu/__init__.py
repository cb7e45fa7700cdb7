"""Speed-ups for machines without a GPU; the README's figures were measured with them.

Without them everything works, only slower, and results differ by rounding alone. Most of that is of `short_attention`,
which rounds the products of queries and keys to 16 bits; its file has the figures.
"""
