"""An environment that a random model can play."""

from typing import Any

from lorapar_ray.grpo.environments import Trajectory, TurnEngine
from tests.e2e.rewards import letters

TURNS = 3
_seen = 0


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
        turn = await engine.generate(trajectory, max_tokens=4)
        texts.append(engine.decode(turn.token_ids))
    trajectory.reward = letters([], ["".join(texts)])[0]
    return trajectory
