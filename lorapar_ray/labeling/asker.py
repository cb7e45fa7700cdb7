"""The Ray Data worker that asks teachers: several blocks of questions are in flight, answers return block by block.

It writes nothing: only the driver writes to the vote store.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from lorapar_ray.config import LabelConfig
from lorapar_ray.labeling.panel import Failure, Panel
from lorapar_ray.labeling.pending import PendingBlocks, Question
from lorapar_ray.labeling.store import Answer
from lorapar_ray.labeling.voting import vote_of, whom_to_ask
from lorapar_ray.sealed import Sealed
from lorapar_ray.storage.cache import on_this_machine
from lorapar_ray.workers import ray_options


def asked(blocks: int, label: LabelConfig, arguments: Mapping[str, Any]) -> Any:
    """The Ray Data dataset of the results of `Asker` on each block, in any order; nothing runs until it is read.

    Args:
        arguments: of `Asker`, without `label`. All are sealed: keys, and what `label` hides in a URL or `extra_body`.
    """
    import ray
    from ray.data import ActorPoolStrategy

    # enough blocks in flight that the next one is ready before a block's last question is answered
    at_once = -(-label.concurrency // label.rows_per_block) + 1
    options = ray_options(label.resources) | {"num_gpus": label.resources.gpu_count or None}
    return ray.data.from_items([{"block": block} for block in range(blocks)], override_num_blocks=blocks).map_batches(
        Asker,
        fn_constructor_args=(Sealed({"label": label.model_dump(mode="json"), **arguments}),),
        batch_size=1,
        compute=ActorPoolStrategy(
            size=label.workers, max_concurrent_calls_per_actor=at_once, max_tasks_in_flight_per_actor=2 * at_once
        ),
        **options,
    )


class Asker:
    """Asks blocks of pending questions."""

    def __init__(self, arguments: Sealed[dict[str, Any]]) -> None:
        """Connect to the teachers and open the file of pending questions.

        Args:
            arguments: `pending`, the file; `bias`, by teacher the log-probabilities to divide out, since sequential
                voting counts calibrated votes; `label`, `apps`, `keys`, `student`, `run` and `dead` as for `Panel`.
        """
        given = dict(arguments.opened())
        self._label = LabelConfig.model_validate(given.pop("label"))
        self._blocks = PendingBlocks(str(on_this_machine(given.pop("pending"))))
        self._bias = given.pop("bias")
        self._panel = Panel(self._label, **given)
        self._teachers = {teacher.name: teacher for teacher in self._label.teachers}
        self._slots = asyncio.Semaphore(self._label.concurrency)

    async def __call__(self, batch: dict[str, Any]) -> Any:
        """Ask every question of each block in `batch["block"]` (numbers); yields {"result": [JSON]}.

        Each result holds `answers` (question, teacher, [answer per rotation]), `failures` (question, teacher, reason)
        and `dead` (teachers given up so far, by name).
        """
        for block in batch["block"]:
            questions = self._blocks.read(int(block))
            asked = await asyncio.gather(*(self._within_slot(question) for question in questions))
            answers, failures = [], []
            for question, (found, failed) in zip(questions, asked, strict=True):
                for name, several in found.items():
                    answers.append([question.key, name, [vars(answer) for answer in several]])
                failures += [[question.key, name, failure.reason] for name, failure in failed.items()]
            result = {"answers": answers, "failures": failures, "questions": len(questions), "dead": self._panel.dead}
            yield {"result": [json.dumps(result)]}

    async def _within_slot(self, question: Question) -> tuple[dict[str, list[Answer]], dict[str, Failure]]:
        async with self._slots:
            return await self._ask(question)

    async def _ask(self, question: Question) -> tuple[dict[str, list[Answer]], dict[str, Failure]]:
        """New answers and failures by teacher; without a quorum it stops asking."""
        votes = [vote_of(name, known, self._bias.get(name)) for name, known in question.known.items()]
        available = [name for name in self._teachers if name not in question.known]
        found: dict[str, list[Answer]] = {}
        failed: dict[str, Failure] = {}
        while available and not self._panel.quorum_lost:
            names = whom_to_ask(self._label, votes, available)
            if not names:
                break
            asked = await asyncio.gather(
                *(self._panel.ask(self._teachers[name], question.prompt, question.answer) for name in names)
            )
            for name, outcome in zip(names, asked, strict=True):
                if isinstance(outcome, Failure):
                    failed[name] = outcome
                else:
                    found[name] = outcome
                    if self._label.sequential:
                        votes.append(vote_of(name, outcome, self._bias.get(name)))
            available = [name for name in available if name not in names]
        return found, failed


def read_result(text: str) -> Mapping[str, Any]:
    """What `Asker` yields, parsed; answers become `Answer`s."""
    result: dict[str, Any] = json.loads(text)
    result["answers"] = [
        (bytes.fromhex(question), name, [Answer(**answer) for answer in several])
        for question, name, several in result["answers"]
    ]
    result["failures"] = [(bytes.fromhex(question), name, reason) for question, name, reason in result["failures"]]
    return result
