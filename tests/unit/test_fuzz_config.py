"""No config file, with any bytes and fields, ends in a traceback: it gives one line, or a config that can be
planned."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.plan import plan
from lorapar_ray.runs import RunDirectory
from tests.unit.fuzzing import WEIRD, changed, damaged, fuzzed, one_line_or_accepted
from tests.unit.test_readme_and_report import QUICKSTART

WRITTEN: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
WHOLE: dict[str, Any] = load_config(QUICKSTART).model_dump(mode="json")
"""Every field of the config, including defaults."""


PLACES = ["seed", "label.teachers.0", "label.definitions.1", "nothing", "data.train.9.path", "", "grpo"]
VALUES = [*(repr(value) for value in WEIRD if value is not None), "[", "&a [*a]", "{a: 1, a: 2}"]


def load(folder: Path, content: bytes, *overrides: str) -> Config | None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    config: Config | None = one_line_or_accepted(lambda: load_config(file, overrides))
    if config is not None:
        again = yaml.load(config.to_yaml(), Loader=yaml.CSafeLoader)
        assert isinstance(again, dict) and again["name"] == config.name
    return config


@fuzzed(150)
@given(content=damaged(QUICKSTART.read_bytes()[:1500]))
def test_a_damaged_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    load(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@fuzzed(350)
@given(tree=st.one_of(changed(WRITTEN), changed(WHOLE)))
def test_a_field_of_another_kind(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    config = load(folder, yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass"))
    if config is not None:
        one_line_or_accepted(lambda: list(plan(config, RunDirectory(folder / "nothing here"))))


@fuzzed(100)
@given(place=st.sampled_from(PLACES), value=st.sampled_from(VALUES))
def test_an_override(tmp_path_factory: pytest.TempPathFactory, place: str, value: str) -> None:
    load(tmp_path_factory.getbasetemp(), QUICKSTART.read_bytes(), f"{place}={value}")
