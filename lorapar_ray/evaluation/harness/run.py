"""Runs one task of one model in lm-eval; our engines answer its questions."""

from __future__ import annotations

from typing import Any

from lorapar_ray.config import EvaluateConfig
from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.evaluation.harness.catalogue import Catalogue, Wanted, quiet
from lorapar_ray.evaluation.harness.judges import judged_by
from lorapar_ray.evaluation.harness.model import Ask, HarnessModel
from lorapar_ray.evaluation.harness.results import leaves, rows_of, summary
from lorapar_ray.progress import console


def evaluate_task(
    catalogue: Catalogue, task: Wanted, settings: EvaluateConfig, ask: Ask, encoder: Encoder
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows by question, see `results.ROW_SCHEMA`; shares by task and group, see `results.summary`).

    The task's own file applies where the settings are not set.

    Args:
        ask: answers requests, in order; several times, since lm-eval asks for each kind in turn.

    Raises:
        UserError: the task or its data is not there, the model has no chat template, or it cannot answer.
    """
    from lm_eval.evaluator import evaluate

    loaded = catalogue.load(task)
    for each in loaded["tasks"].values():
        _adapt(each, settings)
    model = HarnessModel(ask, encoder, settings.engine.max_model_len)
    with quiet(), judged_by(settings.sandbox, settings.pass_at):
        found = evaluate(
            model,
            loaded,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            system_instruction=encoder.system_prompt if settings.chat else None,
        )
    if model.cut:
        console.print(
            f"  {task.text}: {model.cut} prompts were cut at the beginning to fit into evaluate.engine.max_model_len: "
            f"{settings.engine.max_model_len}"
        )
    rows = rows_of(found)
    return rows, summary(rows, leaves(loaded.get("groups", {})))


def _adapt(task: Any, settings: EvaluateConfig) -> None:
    if task.get_config("output_type") != "generate_until":
        return
    own: dict[str, Any] = {}
    if settings.max_gen_toks is not None:
        own["max_gen_toks"] = settings.max_gen_toks
    if settings.samples > 1:
        own |= {"do_sample": True, "temperature": settings.temperature}
        task.set_config(key="repeats", value=settings.samples)
    if own:
        task.set_config(key="generation_kwargs", value=own, update=True)
