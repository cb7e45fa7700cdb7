"""The end of Serve's applications while Serve does not answer."""

import threading

import pytest

from lorapar_ray import serve_apps
from lorapar_ray.errors import UserError


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: Serve never answers."""
    monkeypatch.setattr(serve_apps, "_end", lambda own: threading.Event().wait(60))
    monkeypatch.setattr(serve_apps, "END_LIMIT_S", 0.05)


def test_applications_that_do_not_end_are_an_error() -> None:
    with pytest.raises(UserError, match=r"does not end a, b within 0.05 s; on a cluster `serve shutdown`"):
        serve_apps.end(["b", "a"])


def test_why_the_work_ended_is_not_hidden_by_applications_that_do_not_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no memory"):
        try:
            raise UserError("no memory")
        finally:
            serve_apps.end(["a"])
    assert "Ray Serve does not end a" in capsys.readouterr().out
