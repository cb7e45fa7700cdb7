"""The error lines of models and settings with which vLLM cannot start, as JSON by case.

python -m tests.e2e.engines_that_cannot_start MODEL
"""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.phases import Phases
from lorapar_ray.engines.processes import start_async_llm
from lorapar_ray.engines.settings import engine_arguments, engine_environment
from lorapar_ray.errors import UserError


def with_config(**fields: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def cut_weights(model: Path) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def as_it_is(model: Path) -> None:
    """Only the settings are wrong."""


ENGINE = EngineConfig.model_validate({"dtype": "float32", "max_model_len": 256, "enforce_eager": True})
LARGE_CACHE = {
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
"""256 KiB of cache for each token, so that 8192 tokens need 2 GiB; a longer context would be slow to prepare."""
CASES: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "architecture": (with_config(architectures=["NobodysForCausalLM"], model_type="llama"), {}),
    "head size": (with_config(head_dim=16, hidden_size=64, num_attention_heads=4), {}),
    "cut weights": (cut_weights, {}),
    "longer than the model": (as_it_is, {"max_model_len": 4096}),
    "unknown argument": (as_it_is, {"extra": {"nonsense": 1}}),
    "cache": (with_config(**LARGE_CACHE), {"max_model_len": 8192, "extra": {"load_format": "dummy"}}),
    "batched tokens": (as_it_is, {"extra": {"max_num_batched_tokens": 8}}),
}


async def line(model: Path, settings: dict[str, Any]) -> str:
    engine = EngineConfig.model_validate({**ENGINE.model_dump(), **settings})
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)  # vLLM sets it permanently: later starts here would not fork
    arguments = engine_arguments(str(model), engine, seed=0, trust_remote_code=False)
    try:
        started = start_async_llm(arguments, Phases("engine"), "evaluate.engine")
    except UserError as error:
        return str(error)
    started.shutdown()
    return "it has started"


if __name__ == "__main__":
    good = Path(sys.argv[1])
    os.environ.update(engine_environment(ENGINE, Resources()))
    found = {}
    for name, (change, settings) in CASES.items():
        model = good.with_name(f"{good.name} {name}")
        shutil.copytree(good, model)
        change(model)
        found[name] = asyncio.run(line(model, settings))
    print(json.dumps(found), flush=True)
    os._exit(0)
