"""lm-eval's own command line with our model in it: `lorapar lm-eval --model lorapar --model_args pretrained=...`.

lm-eval 0.4.13 finds no models outside its package by itself: a class has to be registered in its process.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import lm_eval.tasks
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from lorapar_ray.capacity import capacity
from lorapar_ray.config import EngineConfig, Resources
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.errors import UserError
from lorapar_ray.evaluation.engines import Engines
from lorapar_ray.evaluation.harness.catalogue import OUR_TASKS
from lorapar_ray.evaluation.harness.model import MAX_GEN_TOKS, HarnessModel
from lorapar_ray.evaluation.serving import Serve, Served, named_model, serving
from lorapar_ray.gpus import engine_resources
from lorapar_ray.models import resolve_model
from lorapar_ray.session import ray_session

NAME = "lorapar"


@register_model(NAME)
class Lorapar(HarnessModel):
    """Our engines as a model of lm-eval; they end with the process."""

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        engines: int = 1,
        serve: Serve = "auto",
        dtype: str = "auto",
        max_model_len: int = 2048,
        max_gen_toks: int = MAX_GEN_TOKS,
        max_num_seqs: int = 64,
        tensor_parallel: int = 1,
        enforce_eager: bool = False,
        cpus: float = 1.0,
        gpus: float | str = "auto",
        threads: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Start the engines; arguments as `evaluate` and `evaluate.engine` in a config have them.

        Args:
            pretrained: as `lorapar evaluate --model`: a directory, a hub name, `package:NAME`, or BASE+ADAPTER.
            adapter: a LoRA's directory, in place of `+ADAPTER`.
            batch_size, max_batch_size, device: lm-eval passes them; the engines batch by themselves.
        """
        model = named_model(pretrained if adapter is None else f"{pretrained}+{adapter}", "pretrained")
        settings = EngineConfig.model_validate(
            {
                "dtype": dtype,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "tensor_parallel": tensor_parallel,
                "enforce_eager": enforce_eager,
            }
        )
        resources = Resources.model_validate({"cpus": cpus, "gpus": gpus, "threads": threads})
        closing = ExitStack()
        closing.enter_context(ray_session())
        atexit.register(closing.close)  # registered after Ray's, so it runs before Ray's
        running = Engines(
            model.base,
            settings,
            engine_resources(resources, tensor_parallel, int(capacity().largest("GPU"))),
            engines,
            seed=seed,
            where="model_args",
            trust_remote_code=trust_remote_code,
            **serving(model.base, [model.adapter], serve),
        )
        closing.enter_context(running)
        running.start()
        super().__init__(
            Served(running, model.adapter).answers,
            load_encoder(resolve_model(model.base), None, trust_remote_code),
            max_model_len,
            max_gen_toks=max_gen_toks,
            add_bos_token=add_bos_token,
        )


class WithOurTasks(TaskManager):
    """lm-eval's, with our task files after its own and before a user's: a later one of a name replaces an earlier."""

    def __init__(self, *arguments: Any, include_path: Any = None, **options: Any) -> None:
        theirs = include_path if isinstance(include_path, list | tuple) else [include_path]
        folders = [OUR_TASKS, *(each for each in theirs if each)]
        super().__init__(*arguments, include_path=folders, **options)


def run(arguments: Sequence[str]) -> None:
    """lm-eval's command line; our task files are known to it, HumanEval and MBPP in the sandbox among them.

    Raises:
        UserError: from our model; lm-eval prints its own errors.
    """
    from lm_eval.__main__ import cli_evaluate

    lm_eval.tasks.TaskManager = WithOurTasks  # type: ignore[misc]  # each of its commands looks it up here
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise UserError(f"lm-eval: {error}") from error
