"""Environments that a random model can play: one of our own, and one of the library `verifiers`."""

import json
from pathlib import Path
from typing import Any

from verifiers.envs.experimental.gym_env import GymEnv

from lorapar_ray.engines.record import GroupRecord
from lorapar_ray.grpo.environments import Trajectory, TurnEngine
from lorapar_ray.grpo.environments.from_verifiers import from_verifiers
from tests.e2e.rewards import letters

TURNS, TURN_TOKENS = 3, 4
SEEDS = (5, 6)
_seen = 0


class Spelling:
    """A game with gym's methods; each answer earns its share of letters."""

    def reset(self, seed: int) -> str:
        self.number, self.heard = seed, 0
        return f"Spell {seed}."

    def step(self, action: str) -> tuple[str, float, bool, dict[str, Any]]:
        self.heard += 1
        return told(self.number, self.heard), letters([], [action])[0], False, {}


def told(number: int, heard: int) -> str:
    """What the game says after so many answers."""
    return f"No. {heard}: spell {number}!"


def spelling() -> GymEnv:
    """The library's own environment for such games, with its own rubric: the sum of what the steps earned."""
    return GymEnv(Spelling, num_train_episodes=len(SEEDS), num_eval_episodes=1, max_episode_steps=TURNS, seed=SEEDS[0])


_play = from_verifiers(spelling, turn_tokens=TURN_TOKENS)


async def either(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    """A row of `verifiers` (it names the file of its episodes) in its environment, any other in `three_turns`."""
    episodes = row["columns"].get("info", {}).get("episodes")
    if episodes is None:
        return await three_turns(engine, row)
    turns, sample = [], engine._sample

    async def noted(ids: list[int], options: dict[str, Any]) -> GroupRecord:
        asked = list(ids)
        record = await sample(ids, options)
        turns.append([asked, record.token_ids.tolist()])
        return record

    engine._sample = noted
    trajectory = await _play(engine, row)
    with Path(episodes).open("a") as file:
        file.write(json.dumps({"turns": turns, "reward": trajectory.reward}) + "\n")
    return trajectory


async def three_turns(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    """Three short turns of a chat; the process's first episode fails."""
    global _seen
    _seen += 1
    if _seen == 1:
        raise RuntimeError("the first episode goes wrong")
    trajectory = engine.begin(row["prompt_ids"])
    texts = []
    for number in range(TURNS):
        if number:
            trajectory.add(engine.reply(trajectory, f"No. {row['answer']}?"))
        turn = await engine.generate(trajectory, max_tokens=TURN_TOKENS)
        texts.append(engine.decode(turn.token_ids))
    trajectory.reward = letters([], ["".join(texts)])[0]
    return trajectory
