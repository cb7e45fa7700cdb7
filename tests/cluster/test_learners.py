"""Several learners of stage 2, also with a sharded base or shared sequences, take the same step as one learner."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorapar_ray.adapters.job import make_adapter
from lorapar_ray.config import Config, GrpoConfig, Resources
from lorapar_ray.engines.completion import Completion
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.record import record_of
from lorapar_ray.errors import UserError
from lorapar_ray.grpo.batches import Batch, Share, shares_of
from lorapar_ray.grpo.groups import Group
from lorapar_ray.grpo.worker import GrpoJob, learn_worker
from lorapar_ray.runs import RunDirectory
from tests.tiny_run import metrics, tiny_config
from tests.together import run_in_one_group, tasks_here

pytestmark = pytest.mark.cluster
STEPS = 2


ADVANTAGES = [1.5, -0.5, 0.25, -1.25]


def groups(step: int) -> list[Group]:
    """Three groups of different random lengths, with records instead of references."""
    draw = random.Random(step)
    found = []
    for group in range(3):
        prompt = [draw.randrange(5, 4000) for _ in range(6 + 3 * group)]
        drawn = [[draw.randrange(5, 4000) for _ in range(2 + 2 * number + group)] for number in range(4)]
        record = record_of(prompt, [Completion(tokens, [-8.0] * len(tokens), True, step) for tokens in drawn])
        found.append(Group(group, record, record.head, rewards=ADVANTAGES))
    return found


class ScriptedCoordinator:
    """A fake coordinator that returns prepared batches."""

    def resume(self, step: int, stream: Any) -> None: ...

    def ping(self) -> None: ...

    def publish(self, policy: Any, canaries: list[Any]) -> dict[str, float]:
        return {"canaries": float(len(canaries))}

    def batch(self, step: int, rank: int, world: int, packed: bool) -> Share:
        import ray

        made = groups(step)
        for group in made:
            group.record = ray.put(group.record)
        settings = GrpoConfig(group_size=4, mini_batch=2, advantage_scale="none")
        return shares_of(Batch(made, {"reward": 0.0}, [], []), world, settings)[rank]


@pytest.fixture(scope="module")
def run(cluster: None, student: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDirectory]:
    root = tmp_path_factory.mktemp("learners")
    plain = tiny_config(student)
    plain["adapter"] = {"rank": 4, "alpha": 8, "init": "gaussian", "init_std": 0.05}
    config, run = Config.model_validate(plain), RunDirectory(root / "run")
    with tasks_here():
        make_adapter(config, run, run.adapter)
    return config, run


class RefusingCoordinator(ScriptedCoordinator):
    """Fault injection: its engine serves another policy."""

    def publish(self, policy: Any, canaries: list[Any]) -> dict[str, float]:
        raise PolicyMismatch("rollout engine 0 does not serve policy 0: the canary tokens are too far")


@pytest.fixture(scope="module")
def coordinators(cluster: None) -> Iterator[None]:
    """Named fakes, which are the same to all learners: they have no state."""
    import ray

    fakes = {"scripted": ScriptedCoordinator, "refusing": RefusingCoordinator}
    actors = [ray.remote(kind).options(name=name, num_cpus=0).remote() for name, kind in fakes.items()]
    yield
    for actor in actors:
        ray.kill(actor)


def learn(
    run: tuple[Config, RunDirectory], folders: dict[Path, dict[str, Any]], learners: int, refused: Path | None = None
) -> None:
    """Take STEPS steps with `learners` learners for each of some settings, in one folder each; the policies of the run
    in the folder `refused` are refused."""
    config, directory = run
    jobs = [
        GrpoJob(
            model=config.model.model_dump(mode="json"),
            settings={**config.grpo.model_dump(mode="json"), "checkpoint_every": 100, **grpo},
            base=config.model.path,
            adapter_in=str(directory.adapter),
            adapter_out=str(folder / "adapter"),
            regions=None,
            canaries=[[[5, 6, 7, 8], 2]],
            checkpoints=str(folder / "checkpoints"),
            metrics=str(folder / "metrics" / "grpo.jsonl"),
            samples=str(folder / "metrics" / "samples.jsonl"),
            steps=STEPS,
            coordinator="refusing" if folder == refused else "scripted",
            run="test",
            seed=0,
        )
        for folder, grpo in folders.items()
    ]
    resources, place = Resources(cpus=1 / learners), RunDirectory(next(iter(folders)))
    group = {"name": "grpo", "workers": learners, "resources": resources, "run": place, "writes": []}
    run_in_one_group([(learn_worker, job.payload()) for job in jobs], [group])


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter after all steps."""
    assert [line["canaries"] for line in metrics(folder, "grpo")] == [1.0] * STEPS
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_learners_together_take_the_step_of_one_and_a_refused_policy_ends_the_run(
    run: tuple[Config, RunDirectory], coordinators: None, tmp_path: Path
) -> None:
    settings = {"kl_beta": 0.05, "mini_batch": 2}  # the second update has a single group: one learner gets nothing
    refused = tmp_path / "refused"
    with pytest.raises(UserError, match=r"^rollout engine 0 does not serve policy 0: the canary tokens are too far$"):
        learn(run, {tmp_path / "alone": settings, refused: settings}, 1, refused)
    assert metrics(refused, "grpo") == [] and not (refused / "adapter").exists()
    shared = {**settings, "learners": 2, "sequence_parallel": 2}
    ways = {
        "two": settings,
        "cut": {**settings, "sharding": "fsdp2"},
        "sequences": shared,
        "both": {**shared, "sharding": "fsdp2", "gradient_checkpointing": True},
    }
    learn(run, {tmp_path / name: each for name, each in ways.items()}, 2)
    before, alone = load_file(run[1].adapter / "adapter_model.safetensors"), learnt(tmp_path / "alone")
    assert all(not torch.equal(alone[key], value) for key, value in before.items())
    for name in ways:
        together = learnt(tmp_path / name)
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-6)
