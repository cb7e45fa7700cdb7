"""What an engine's ranks say about the policy that they loaded, and the error if it is another one."""

from __future__ import annotations

from collections.abc import Sequence

from lorapar_ray.errors import UserError


class PolicyMismatch(UserError):
    """An engine does not serve the policy it was sent: nothing sampled from it may be trained on."""


def agreed(digests: Sequence[str]) -> str:
    """The digest of the adapter that all ranks of a tensor-parallel engine loaded.

    Raises:
        PolicyMismatch: they differ: the engine would compute with parts of two policies.
    """
    if len(set(digests)) != 1:
        raise PolicyMismatch(f"its ranks loaded different policies: {', '.join(each[:9] for each in digests)}")
    return digests[0]


def verified(claimed: Sequence[str], checked: Sequence[tuple[str, str]]) -> str:
    """The digest of the adapter that all ranks compute with.

    Args:
        claimed: the digests that the ranks returned when they loaded it.
        checked: of each rank, the digest of the adapter that it compared with its model, and what differs.

    Raises:
        PolicyMismatch: digests differ, or a rank computes with something else.
    """
    digest = agreed([*claimed, *(found for found, _ in checked)])
    for rank, (_, wrong) in enumerate(checked):
        if wrong:
            raise PolicyMismatch(f"on its rank {rank}, {wrong}" if len(checked) > 1 else wrong)
    return digest
