"""What to do about the token that a cluster asks everyone for who connects to it."""

from __future__ import annotations

NOT_ACCEPTED = (
    "does not accept this machine's token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the "
    "cluster's"
)
"""Follows the cluster's name."""


NOT_ASKED = (
    "asks nobody for a token: whoever reaches its address can run code on it; start its nodes with RAY_AUTH_MODE=token"
)
"""Follows the cluster's name, where this machine has a token for it."""


def refused(error: BaseException) -> bool:
    """Whether an error of Ray's says so: the token is missing or wrong."""
    return type(error).__name__ == "AuthenticationError"
