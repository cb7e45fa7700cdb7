"""Environments: several turns, tools and other agents, behind one user function.

    async def rollout(engine: TurnEngine, row: dict) -> Trajectory

`grpo.environment: module:function` names it. It plays one sample: `engine.begin` starts a trajectory, `await
engine.generate(trajectory)` lets the policy continue it, `trajectory.add` appends the environment's tokens. Inputs and
outputs are tokens: training uses exactly the sampled tokens, and nothing is tokenised again. The policy reads the
environment's tokens, but they enter neither the loss nor a ratio.

Episodes run in separate workers, many at once in one event loop, in neither the engine's nor the coordinator's process.
An episode that raises, takes too long or breaks a rule loses its sample and is counted; the group continues without it.
A worker that hangs is replaced, and its groups start again. If an engine dies, a turn is repeated, not an episode.
"""

from lorapar_ray.grpo.environments.trajectory import Trajectory, TrajectoryFull, Turn
from lorapar_ray.grpo.environments.turns import TurnEngine

__all__ = ["Trajectory", "TrajectoryFull", "Turn", "TurnEngine"]
