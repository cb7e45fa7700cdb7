"""Peers that compute the same votes: vLLM offline in one process, and Ray's two batch processors.

All get the same prompts, engine settings and constrained single token. Offline is the limit, so it also gets what our
engines add for the platform (smaller blocks of the key-value cache on a CPU); the processors keep vLLM's defaults, as
for their users. Offline gets the prompts as token ids, the processors as text, like our replicas. Start time does not
count: each reports votes per second from the engine's first counted prompt. If the engine outlives a call, a quarter of
the prompts warms it up first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.engines.settings import engine_arguments, engine_environment, platform_arguments
from lorapar_ray.precision import engine_dtype

BATCH = 16
RESULT = "votes per second: "
"""Marks the result among the lines that an engine prints."""


def offline(
    model: str, engine: EngineConfig, resources: Resources, prompts: list[list[int]], choices: list[int]
) -> float:
    """Votes per second of `vllm.LLM.generate`, in a separate process; the first quarter warms up."""
    task = {"model": model, "engine": engine.model_dump(), "prompts": prompts, "choices": choices}
    environment = os.environ | engine_environment(engine, resources)
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(task), env=environment, capture_output=True, text=True, check=False
    )
    found = [line.removeprefix(RESULT) for line in done.stdout.split("\n") if line.startswith(RESULT)]
    if not found:
        raise SystemExit(done.stderr[-2000:])
    return float(found[-1])


def _offline_process() -> None:
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    engine = EngineConfig.model_validate(task["engine"])
    arguments = engine_arguments(task["model"], engine, seed=0, trust_remote_code=False)
    llm = LLM(**platform_arguments(), **arguments)
    params = SamplingParams(**sampling(task["choices"]))
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    warm = len(prompts) // 4
    llm.generate(prompts[:warm], params, use_tqdm=False)
    start = time.perf_counter()
    llm.generate(prompts[warm:], params, use_tqdm=False)
    print(f"{RESULT}{(len(prompts) - warm) / (time.perf_counter() - start)}", flush=True)


def sampling(choices: Sequence[int]) -> dict[str, Any]:
    """One token among the choices, with the log-probability of each."""
    return {"max_tokens": 1, "temperature": 1.0, "allowed_token_ids": list(choices), "logprobs": len(choices)}


def engine_processor(
    model: str, engine: EngineConfig, resources: Resources, texts: list[str], choices: list[int]
) -> float:
    """Ray Data's `vLLMEngineProcessorConfig`: an engine inside a Ray Data actor, started by each call."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=_without_model(model, engine),
        placement_group_config={"bundle_per_worker": {"CPU": resources.cpus}},
        runtime_env={"env_vars": engine_environment(engine, resources)},
        batch_size=BATCH,
        concurrency=1,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )
    params = sampling(choices)
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["text"], "sampling_params": params},
        postprocess=lambda row: {"ended": time.time(), "took": row["time_taken_llm"]},
    )
    rows = _rows_of(processor, texts)
    return len(rows) / (max(row["ended"] for row in rows) - min(row["ended"] - row["took"] for row in rows))


def serve_processor(
    model: str, engine: EngineConfig, resources: Resources, texts: list[str], choices: list[int]
) -> float:
    """Ray Data's `ServeDeploymentProcessorConfig` over a deployment of `ray.serve.llm`."""
    from ray import serve
    from ray.data.llm import ServeDeploymentProcessorConfig, build_processor
    from ray.serve.config import HTTPOptions
    from ray.serve.llm import LLMConfig, build_llm_deployment
    from ray.serve.llm.openai_api_models import CompletionRequest

    sent = Path(tempfile.mkdtemp(prefix="labeling-")) / "sent"

    class VoteRequest:
        """Makes a `CompletionRequest` from a row's fields; Ray Data has turned lists into arrays.

        Records the time: rows leave the processor in one burst, so their own times are useless.
        """

        def __new__(cls, **fields: Any) -> Any:
            with sent.open("a") as file:
                file.write(f"{time.time()}\n")
            return CompletionRequest(
                **{name: value.tolist() if hasattr(value, "tolist") else value for name, value in fields.items()}
            )

    serve.start(http_options=HTTPOptions(host="127.0.0.1", location="NoServer"))
    config = LLMConfig(
        model_loading_config={"model_id": "teacher", "model_source": model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": resources.cpus}},
        deployment_config={"num_replicas": 1, "max_ongoing_requests": 3 * engine.max_num_seqs // 2},
        engine_kwargs=_without_model(model, engine),
        runtime_env={"env_vars": engine_environment(engine, resources)},
        log_engine_metrics=False,
    )
    app = build_llm_deployment(config)
    serve.run(app, name="peer", route_prefix=None)
    deployment = next(iter(serve.status().applications["peer"].deployments))
    processor = build_processor(
        ServeDeploymentProcessorConfig(
            deployment_name=deployment,
            app_name="peer",
            dtype_mapping={"VoteRequest": VoteRequest},
            batch_size=BATCH,
            concurrency=1,
        ),
        preprocess=lambda row: {
            "method": "completions",
            "dtype": "VoteRequest",
            "request_kwargs": {"model": "teacher", "prompt": row["text"], **sampling(choices)},
        },
        postprocess=lambda row: {"ended": time.time()},
    )
    warm = len(texts) // 4
    try:
        _rows_of(processor, texts[:warm])
        sent.unlink()
        rows = _rows_of(processor, texts[warm:])
        began = min(float(line) for line in sent.read_text().splitlines())
        return len(rows) / (max(row["ended"] for row in rows) - began)
    finally:
        serve.shutdown()


def _rows_of(processor: Any, texts: list[str]) -> list[dict[str, Any]]:
    import ray

    blocks = -(-len(texts) // BATCH)
    questions = ray.data.from_items([{"text": text} for text in texts], override_num_blocks=blocks)
    rows: list[dict[str, Any]] = processor(questions).take_all()
    return rows


def _without_model(model: str, engine: EngineConfig) -> dict[str, Any]:
    arguments = {"dtype": engine_dtype(), **engine_arguments(model, engine, seed=0, trust_remote_code=False)}
    return {key: value for key, value in arguments.items() if key != "model"}


if __name__ == "__main__":
    _offline_process()
