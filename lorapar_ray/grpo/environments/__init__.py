"""Environments: several turns, tools, other agents, behind one function of the user's.

    async def rollout(engine: TurnEngine, row: dict) -> Trajectory

`grpo.environment: module:function` names it. It plays one sample: `engine.begin` starts a trajectory,
`await engine.generate(trajectory)` lets the policy go on with it, `trajectory.add` puts in what the environment says.
Tokens go in and tokens come out: what the engine sampled is what is trained on, and nothing is tokenised again. What
the environment put in is read by the policy, and neither predicted, trained nor counted in a ratio.

Episodes run in workers of their own, many at once in one event loop, beside neither engine nor coordinator. One that
raises, takes too long or breaks a rule costs its sample and is counted; the group goes on with the others. A worker
that hangs is replaced, and so are its groups. An engine that dies costs a turn, not an episode.
"""

from lorapar_ray.grpo.environments.trajectory import Trajectory, TrajectoryFull, Turn
from lorapar_ray.grpo.environments.turns import TurnEngine

__all__ = ["Trajectory", "TrajectoryFull", "Turn", "TurnEngine"]
