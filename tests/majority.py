"""What independent teachers' majorities must reach."""

from math import comb


def majority_accuracy(p: float, n: int) -> float:
    """Probability that the majority of n independent teachers (n odd), each right with probability p, is right."""
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))
