"""Our model class compared with lm-eval's own `hf` class: the same questions, decision by decision.

Both compute in float32, so that the comparison does not depend on bfloat16 rounding. For each different decision it
reports the logits: the margin between the two best choices, or between the two best tokens at the first difference of
two continuations. Answers are saved when they arrive, so that an interrupted comparison resumes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

MODEL = "package:smollm2-135m-instruct"
DATA = {"gsm8k": "gsm8k", "mmlu": "mmlu", "arc_easy": "llm_adapters/ARC-Easy"}
"""Folders of `--data` by family."""
TASKS = {"gsm8k@0": 300, "mmlu@0": 6, "arc_easy@0": 300, "gsm8k@8": 24, "mmlu@5": 1}
"""Questions of each task; of MMLU in each of its 57 subjects."""
QUICK = {"gsm8k@0": 4, "mmlu@0": 1, "arc_easy@0": 8}
MAX_MODEL_LEN = 4096
"""The longest prompt with five examples of MMLU fits."""
MAX_GEN_TOKS = 64
"""For both, to limit the time on a CPU."""
HF_BATCH = {"gsm8k@0": 32, "gsm8k@8": 8, "mmlu@0": 8, "mmlu@5": 1, "arc_easy@0": 8}
"""Batch sizes of the peer, which scores over the whole vocabulary at once: larger batches of choices need gigabytes."""
HF_KEPT = 16
"""The peer's answers are saved in parts of this many, or a whole batch if that is larger."""


@dataclass
class Compared:
    """The comparison on one task."""

    task: str
    questions: int
    decisions: int
    """Questions × metrics × filters."""
    same: int
    accuracy: dict[str, list[float]]
    """For each metric: ours, theirs."""
    same_text: int | None
    """Questions with exactly equal continuations; None if the task generates nothing."""
    largest_gap: float | None
    """Largest difference of the choices' log-probabilities, in nats."""
    differing: list[dict[str, Any]] = field(default_factory=list)
    """Questions with different decisions, and their margins."""
    parted: list[float] = field(default_factory=list)
    """At the first difference of two continuations: the best token's logit minus the second best's, computed by
    `hf`."""
    seconds: dict[str, float] = field(default_factory=dict)


def compare(data: Path, quick: bool, device: str, keep: Path) -> list[Compared]:
    """Evaluate with both.

    Args:
        keep: folder for the answers of both, from which a later call resumes.
    """
    from lorapar_ray.evaluation.harness.catalogue import Catalogue

    catalogue = Catalogue({family: str(data / folder) for family, folder in DATA.items()})
    tasks = QUICK if quick else TASKS
    ours = _ours(catalogue, tasks, device, keep)
    theirs = {task: _theirs(catalogue, task, n, device, keep) for task, n in tasks.items()}
    found = [_compared(task, ours[task], theirs[task]) for task in tasks]
    _margins(found, {task: (ours[task], theirs[task]) for task in tasks}, device)
    return found


def _kept(file: Path, work: Callable[[], Any]) -> Any:
    """The result of `work`, or the result saved in `file` by an earlier call."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(work()), encoding="utf-8")
        draft.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


def _ours(catalogue: Any, tasks: Mapping[str, int], device: str, keep: Path) -> dict[str, Any]:
    from lorapar_ray.config import EngineConfig, Resources
    from lorapar_ray.datasets.chat import load_encoder
    from lorapar_ray.evaluation.answers import AnswerStore
    from lorapar_ray.evaluation.engines import Engines
    from lorapar_ray.evaluation.serving import Served, named_model
    from lorapar_ray.models import resolve_model
    from lorapar_ray.session import ray_session

    model = named_model(MODEL)
    engine = EngineConfig(dtype="float32", max_model_len=MAX_MODEL_LEN, enforce_eager=device == "cpu")
    resources = Resources(cpus=1, gpus=0 if device == "cpu" else 1, threads=len(os.sched_getaffinity(0)))
    files = {task: keep / f"ours-{task}-{n}.json" for task, n in tasks.items()}
    with ExitStack() as closing:
        ours: Any = None
        if not all(file.is_file() for file in files.values()):
            closing.enter_context(ray_session())
            engines = closing.enter_context(Engines(model.base, engine, resources))
            engines.start()
            served = Served(engines, None, AnswerStore(keep / "answers"))
            ours = _our_class(served.answers, load_encoder(resolve_model(MODEL), None))
        return {task: _kept(files[task], partial(_evaluated, catalogue, task, tasks[task], ours)) for task in tasks}


def _our_class(ask: Any, encoder: Any) -> Any:
    from lorapar_ray.evaluation.harness.model import HarnessModel

    return HarnessModel(ask, encoder, MAX_MODEL_LEN)


def _theirs(catalogue: Any, task: str, limit: int, device: str, keep: Path) -> dict[str, Any]:
    def work() -> dict[str, Any]:
        import torch
        from lm_eval.models.huggingface import HFLM

        from lorapar_ray.models import resolve_model

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        batch = HF_BATCH[task]
        model = HFLM(
            pretrained=resolve_model(MODEL), device=device, dtype="float32", batch_size=batch, max_length=MAX_MODEL_LEN
        )
        for kind in ("loglikelihood", "generate_until"):
            answers = _in_parts(getattr(model, kind), max(HF_KEPT, batch), keep / f"hf-{task}-{limit}")
            setattr(model, kind, answers)
        return _evaluated(catalogue, task, limit, model)

    found: dict[str, Any] = _kept(keep / f"hf-{task}-{limit}.json", work)
    return found


def _in_parts(answer: Callable[..., list[Any]], size: int, keep: Path) -> Callable[..., list[Any]]:
    """Wrap `answer` to save its answers in parts of `size` requests; a task's requests always have the same order."""

    def answers(requests: Sequence[Any], **_: Any) -> list[Any]:
        found = []
        for first in range(0, len(requests), size):
            part = list(requests[first : first + size])
            found += _kept(keep / f"{first}-{first + len(part)}.json", partial(answer, part, disable_tqdm=True))
        return found

    return answers


def _evaluated(catalogue: Any, task: str, limit: int, model: Any) -> dict[str, Any]:
    """{rows, scores, seconds}: rows by question, and the log-probability of each choice."""
    from lm_eval.evaluator import evaluate

    from lorapar_ray.evaluation.harness.catalogue import quiet, wanted
    from lorapar_ray.evaluation.harness.results import rows_of

    loaded = catalogue.load(wanted(task))
    for each in loaded["tasks"].values():
        if each.get_config("output_type") == "generate_until":
            each.set_config(key="generation_kwargs", value={"max_gen_toks": MAX_GEN_TOKS}, update=True)
    start = time.monotonic()
    with quiet():
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - start
    print(f"{type(model).__name__} {task}: {seconds:.0f} s", flush=True)
    scores = {
        f"{name}/{sample['doc_id']}": [float(response[0]) for response in sample["filtered_resps"]]
        for name, samples in found["samples"].items()
        for sample in samples
        if len(sample["arguments"]) > 1
    }
    return {"rows": rows_of(found), "scores": scores, "seconds": seconds}


def _compared(task: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Compared:
    pairs = list(zip(ours["rows"], theirs["rows"], strict=True))
    names = {(a["task"], a["id"]) for a, _ in pairs}
    metrics = dict.fromkeys(f"{a['metric']}, {a['filter']}" for a, _ in pairs)
    generated = not ours["scores"]
    texts = {(a["task"], a["id"]): a["completion"] == b["completion"] for a, b in pairs}
    gaps = [abs(x - y) for key, own in ours["scores"].items() for x, y in zip(own, theirs["scores"][key], strict=True)]
    return Compared(
        task=task,
        questions=len(names),
        decisions=len(pairs),
        same=sum(a["right"] == b["right"] for a, b in pairs),
        accuracy={
            metric: [
                _mean(row["value"] for row in rows if f"{row['metric']}, {row['filter']}" == metric)
                for rows in (ours["rows"], theirs["rows"])
            ]
            for metric in metrics
        },
        same_text=sum(texts.values()) if generated else None,
        largest_gap=None if generated else max(gaps),
        differing=[
            {"task": a["task"], "id": a["id"], "metric": a["metric"], "ours": a["extracted"], "theirs": b["extracted"]}
            for a, b in pairs
            if a["right"] != b["right"]
        ],
        seconds={"ours": ours["seconds"], "hf": theirs["seconds"]},
    )


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def _margins(found: Sequence[Compared], both: Mapping[str, Any], device: str) -> None:
    """Add the margin of each different decision."""
    for compared in found:
        ours, theirs = both[compared.task]
        for each in compared.differing:
            scores = theirs["scores"].get(f"{each['task']}/{each['id']}")
            if scores:
                best, second = sorted(scores, reverse=True)[:2]
                each["margin_nats"] = best - second
        if compared.same_text is not None:
            texts = {
                row["id"]: (row["prompt"], row["completion"], other["completion"])
                for row, other in zip(ours["rows"], theirs["rows"], strict=True)
                if row["completion"] != other["completion"]
            }
            compared.parted = _parting_margins(list(texts.values()), device)


def _parting_margins(texts: Sequence[tuple[str, str, str]], device: str) -> list[float]:
    """For each (prompt, continuation, other continuation): the gap of the two best logits at their first difference."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorapar_ray.models import resolve_model

    if not texts:
        return []
    path = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    margins = []
    for prompt, first, second in texts:
        ids, one, other = (tokenizer.encode(text) for text in (prompt, first, second))
        common = next(
            (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids + one[:common]], device=device)).logits[0, -1].double()
        best, runner_up = logits.topk(2).values.tolist()
        margins.append(best - runner_up)
    return margins


def as_json(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """JSON for the results page."""
    return [asdict(each) for each in found]
