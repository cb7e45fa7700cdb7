"""One Ray for the tests of a process that need one: starting it takes longer than most of them."""

from contextlib import ExitStack

from lorapar_ray.session import ray_session

_running = ExitStack()


def start() -> None:
    """Be connected to it; does nothing where it runs."""
    import ray

    if not ray.is_initialized():
        _running.enter_context(ray_session())


def stop() -> None:
    """End it, and take back what it has set in this process's environment."""
    _running.close()
