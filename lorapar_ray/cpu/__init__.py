"""Speed-ups for machines without a GPU; the README's figures were measured with them.

Results are the same without them, only slower.
"""
