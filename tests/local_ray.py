"""One Ray for all tests of a process that need it: its start takes longer than most tests."""

from contextlib import ExitStack

from lorapar_ray.session import ray_session

_running = ExitStack()


def start() -> None:
    """Start it and connect; does nothing if it already runs."""
    import ray

    if not ray.is_initialized():
        _running.enter_context(ray_session())


def stop() -> None:
    """End it, and undo its changes of this process's environment."""
    _running.close()
