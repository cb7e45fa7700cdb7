"""Environments: how they are named, loaded and called, and the calculator."""

import asyncio
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import GrpoConfig
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.environments.actor import EnvironmentActor, row_of
from lorapar_ray.grpo.environments.calculator import calculate
from lorapar_ray.grpo.environments.registry import get_environment
from lorapar_ray.models import architecture, resolve_model
from tests.unit.faked_engine import encoder


def test_the_calculator_calculates_and_takes_nothing_else() -> None:
    assert [calculate(each) for each in ("12 * 7", "1/3 + 1/6", "-(2.5 - 4) * 2")] == ["84", "1/2", "3"]
    assert {calculate(each) for each in ("2 ** 9", "__import__('os')", "1/0", "9" * 99, "True + 1", "(")} == {"error"}


@pytest.mark.parametrize("embeddings", [100, 60000])
def test_a_tokenizers_tokens_beyond_the_models_embeddings_are_refused(embeddings: int, tmp_path: Path) -> None:
    encoder().tokenizer.save_pretrained(tmp_path)
    config = architecture(resolve_model("package:smollm2-135m-instruct"), trust_remote_code=False)
    config.vocab_size = embeddings
    config.save_pretrained(tmp_path)
    settings = {"environment": "lorapar_ray.grpo.environments.calculator:rollout", "rewards": [{"name": "environment"}]}
    worker = EnvironmentActor({"settings": settings, "rows": [], "model": str(tmp_path), "trust_remote_code": False})
    assert worker._limits.vocabulary == min(embeddings, len(encoder().tokenizer))


def test_a_row_has_our_fields_and_the_datas_columns() -> None:
    question = {"prompt": "q", "answer": "4", "prompt_ids": [5], "columns": '{"answer": 4, "level": 2}'}
    assert row_of(question) == {
        "prompt": "q",
        "answer": "4",
        "prompt_ids": [5],
        "level": 2,
        "columns": {"answer": 4, "level": 2},
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my_module", "is not module:function"),
        ("no_such_module:rollout", "no_such_module"),
        ("lorapar_ray.grpo.environments.calculator:calculate", "is not an async function"),
        ("tests.unit.faked_engine:failed", "cannot be called with an engine and a row"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        get_environment(name)


def test_a_config_names_the_environment_that_its_reward_is_of() -> None:
    with pytest.raises(ValueError, match=r"grpo.environment gives its trajectories; name one there"):
        GrpoConfig(rewards=[{"name": "environment"}])


def test_a_module_that_sets_signal_handlers_is_imported_on_any_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_a_handler.py").write_text(
        "import signal\n"
        "usual = signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "async def rollout(engine, row):\n    return usual\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before, function = signal.getsignal(signal.SIGTERM), signal.signal
    with ThreadPoolExecutor(1) as thread:
        rollout: Any = thread.submit(get_environment, "sets_a_handler:rollout").result()
    assert asyncio.run(rollout(None, {})) == before == signal.getsignal(signal.SIGTERM)
    del sys.modules["sets_a_handler"]
    get_environment("sets_a_handler:rollout")
    assert before == signal.getsignal(signal.SIGTERM) and signal.signal is function
