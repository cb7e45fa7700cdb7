from collections.abc import Iterator

import pytest

from lorapar_ray.session import ray_session


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray on this machine, for the tests of one file."""
    with ray_session():
        yield
