"""Groups of completions: sampled by whichever engine has room, then rewarded by the reward workers."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorapar_ray.config import GrpoConfig
from lorapar_ray.datasets.chat import Encoder
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.engine_pool import EnginePool
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.rewards.actor import RewardWorkers
from lorapar_ray.progress import console
from lorapar_ray.text import one_line

REWARD_FIELDS = ("answer", "response", "messages", "columns")


class Rollouts:
    """Samples and rewards one group at a time; many calls run side by side in the coordinator's event loop."""

    def __init__(
        self,
        settings: GrpoConfig,
        plan: dict[str, Any],
        encoder: Encoder,
        engines: EnginePool,
        rewards: RewardWorkers,
    ) -> None:
        """`plan` as the coordinator has it."""
        self._settings = settings
        self._rows: Sequence[dict[str, Any]] = plan["rows"]
        self._steps, self._seed = plan["steps"], plan["seed"]
        self._encoder, self._engines, self._rewards = encoder, engines, rewards
        self._told = False

    async def sample(self, index: int, step: int, attempt: int) -> Group:
        """Completions of prompt `index`, seeded by run, step, attempt and prompt."""
        settings, row = self._settings, self._rows[index]
        sampling = {
            "n": settings.group_size,
            "temperature": settings.temperature,
            "max_tokens": settings.max_completion_length,
            "stop": list(settings.stop),
            "stop_token_ids": self._encoder.end_ids,
            "seed": zlib.crc32(f"{self._seed}/{step}/{attempt}/{index}".encode()),
        }
        [completions] = await self._engines.run(lambda engine: engine.generate.remote([row["prompt_ids"]], sampling))
        texts = [self._encoder.answer_text(done.token_ids, settings.stop) for done in completions]
        return Group(row=row, completions=completions, texts=texts)

    async def reward(self, group: Group, step: int) -> None:
        """Fill in the group's rewards."""
        count, row = len(group.texts), group.row
        columns = {key: [row[key]] * count for key in REWARD_FIELDS if key in row}
        columns["completion_ids"] = [done.token_ids for done in group.completions]
        columns["trainer_state"] = [{"global_step": step, "max_steps": self._steps}] * count
        start = time.monotonic()
        group.take(await self._rewards.score([row["prompt"]] * count, group.texts, columns), self._settings)
        group.reward_seconds = time.monotonic() - start

    def report_failures(self, groups: list[Group], step: int) -> None:
        """Show the first failure of a reward; stop if one failed on every sample of the step."""
        samples = sum(len(group.texts) for group in groups)
        failed = sum((Counter(group.failed) for group in groups), Counter[str]())
        errors = {name: text for group in reversed(groups) for name, text in group.errors.items()}
        for name, count in failed.items():
            if count == samples:
                raise UserError(
                    f"grpo.rewards: '{name}' failed on all {samples} samples of step {step + 1}: {errors[name]}"
                )
        if errors and not self._told:
            self._told = True
            first = "; ".join(f"{name}: {text}" for name, text in errors.items())
            console.print(f"  a reward failed on some samples, which count 0 for it; the first: {one_line(first, 500)}")
