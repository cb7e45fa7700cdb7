"""Models of installed packages are unpacked once, with the project's own message."""

from pathlib import Path

import pytest
from tqdm.auto import tqdm

from lorapar_ray import models
from lorapar_ray.errors import UserError


def test_unpacking_prints_one_line_and_no_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dequantise(gguf: Path, out: Path, architecture: str) -> None:
        list(tqdm([gguf], desc="Loading weights"))
        (out / architecture).mkdir(parents=True)

    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_dequantise", dequantise)  # the real one takes a minute
    monkeypatch.setitem(models.PACKAGED, "small", ("json", lambda scratch: scratch / "small.gguf", "Llama"))
    place = tmp_path / "models" / "small"
    assert models.resolve_model("package:small") == models.resolve_model("package:small") == str(place)
    assert [path.name for path in place.iterdir()] == ["Llama"]
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("unpacking model 'small'") == 1


def test_a_package_s_model_is_looked_for_without_unpacking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path))
    models.require_there("package:smollm2-135m-instruct")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(models.PACKAGED, "small", ("no_such_package", lambda scratch: scratch, "Llama"))
    for ask in (models.require_there, models.resolve_model):
        with pytest.raises(
            UserError, match="'package:small': its package is missing; pip install no_such_package gguf"
        ):
            ask("package:small")
    with pytest.raises(UserError, match="no such directory"):
        models.require_there("/no/such/model")
