"""Speed-ups for machines without a GPU, kept because the README's figures were measured with them.

Nothing outside this folder depends on them for a right answer: without them the same results come more slowly.
"""
