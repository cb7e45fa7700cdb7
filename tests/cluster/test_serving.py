"""`lorapar serve` on a cluster whose Ray Serve runs already: it publishes only by the options that it asks for, and
leaves what others run there."""

from pathlib import Path
from typing import Any

import pytest

from lorapar_ray import serve_apps
from lorapar_ray.config import Config
from lorapar_ray.errors import UserError
from lorapar_ray.runs import RunDirectory
from lorapar_ray.serve_apps import deployed, end, runs_as_asked, start_serve
from lorapar_ray.serving import job
from tests.ports import free_port

pytestmark = pytest.mark.cluster


CONFIG = Config.model_validate(
    {
        "name": "x",
        "model": {"path": "package:smollm2-135m-instruct"},
        "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]},
    }
)


class Light:
    """Stands for an application with an engine: what it answers does not matter here."""

    def ready(self) -> dict[str, Any]:
        return {"pid": 7}


def refusal(run: Path, address: job.Address) -> str:
    """Why the command does not serve."""
    with pytest.raises(UserError) as refused, job.serving(CONFIG, RunDirectory(run), address):
        pass
    return str(refused.value)


def test_a_serve_that_runs_already(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import serve

    for module in (job, serve_apps):
        monkeypatch.setattr(module, "is_own_ray", lambda: False)  # as on a cluster
    monkeypatch.delenv(job.KEY, raising=False)
    light = serve.deployment(Light).bind()
    monkeypatch.setattr(job, "_server", lambda *_: light)
    place = job.Address(port=free_port())
    asked: dict[str, Any] = {"host": place.host, "port": place.port, **job.PLAIN_HTTP}

    def lives(name: str) -> bool:
        return bool(serve.get_app_handle(name).ready.remote().result(timeout_s=30) == {"pid": 7})

    assert not runs_as_asked(job.APP, **asked)
    try:
        start_serve(host="127.0.0.1", location="NoServer")  # as for teachers
        assert list(deployed([serve.RunTarget(light, name="a", route_prefix=None)], {"a": "a"})) == [("a", "")]
        start_serve(**asked)  # Ray only warns
        said = refusal(tmp_path, place)
        assert "port 8000, location Disabled instead of" in said and f"port {place.port}, location HeadOnly" in said
        assert lives("a")
        end(["a"])
        serve.shutdown()

        with job.serving(CONFIG, RunDirectory(tmp_path), place) as told:
            assert told["models"] == ["base"]
            assert f"runs '{job.APP}' already, from another `lorapar serve`: end" in refusal(tmp_path, place)
            elsewhere = job.Address(host="127.0.0.2", port=place.port)
            assert "with host 127.0.0.1 instead of host 127.0.0.2, and keeps that" in refusal(tmp_path, elsewhere)
            assert lives(job.APP)
        assert not runs_as_asked(job.APP, **asked)  # it has ended the Serve that it began
    finally:
        serve.shutdown()
