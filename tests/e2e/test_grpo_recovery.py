"""Stage 2 loses each kind of process it has, by `kill -9`, and goes on: no version is skipped, no prompt is lost."""

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.chaos import Recovery
from tests.e2e.conftest import FinishedRun
from tests.e2e.drawing import require_each_step_and_prompt_once
from tests.e2e.test_interruption import copy_before
from tests.processes import below, runs
from tests.tiny_run import ROOT, command, lorapar, metrics
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e
STEPS, DRIVER_AFTER = 10, 8
ENGINES = ["ray::(EngineActor|AnsweringEngine)", "VLLM::EngineCore"]
REWARDS = ["lorapar_ray.grpo.rewards.worker", "ray::RewardActor"]
LEARNERS = ["ray::RayTrainWorker", "ray::Coordinator"]
"""Patterns in the command lines of what is killed."""
FAULTS = dict.fromkeys(ENGINES, "engine child") | dict.fromkeys(REWARDS, "reward process")
FAULTS |= dict(zip(LEARNERS, ("worker", "coordinator"), strict=True))


def draw(chance: Random, thorough: bool) -> dict[str, int]:
    """What is killed after how many finished steps; the driver comes last.

    All, or one of the rewards' and one of the learners': an engine dies in test_grpo_policy.py, and here with the
    coordinator, which has started it.
    """
    victims = [*ENGINES, *REWARDS, *LEARNERS] if thorough else [chance.choice(REWARDS), chance.choice(LEARNERS)]
    chance.shuffle(victims)
    steps = sorted(chance.sample(range(1, DRIVER_AFTER - 1), len(victims)))
    return dict(zip(victims, steps, strict=True))


@pytest.mark.chaos("grpo", "worker", "coordinator", "engine child", "reward process", "driver")
def test_every_kind_of_process_may_die(
    chance: Random, thorough: bool, recovery: Recovery, finished: FinishedRun, tmp_path: Path
) -> None:
    victims = draw(chance, thorough)
    run = copy_before(finished, "grpo", tmp_path / "run")
    changes = (f"steps={STEPS}", "max_staleness=1", "refill_limit=0", "checkpoint_every=1")
    arguments = ["-c", finished.config, "-d", run, *(f"--set=grpo.{change}" for change in changes)]
    log = (tmp_path / "log").open("w")
    # `run`, whose driver makes the first engines, since the evaluation would use them too
    process = subprocess.Popen(command("run", *arguments), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    killed: list[str] = []
    waiting: list[tuple[int, ExitStack]] = []  # until a further step is done: how many were, and its time
    orphans: list[psutil.Process] = []

    def driver_is_next() -> bool:
        """Kills those whose time has come, one at each look."""
        done = len(metrics(run, "grpo"))
        for steps, timed in [each for each in waiting if each[0] < done]:
            timed.close()
            waiting.remove((steps, timed))
        for what, after in victims.items():
            if what not in killed and done >= after and (found := below(what, process.pid)):
                orphans.extend(found[0].children(recursive=True))
                found[0].kill()
                killed.append(what)
                timed = ExitStack()
                timed.enter_context(recovery("grpo", FAULTS[what], what))
                waiting.append((done, timed))
                break
        return done >= DRIVER_AFTER and not waiting

    try:
        wait_until("all are killed", driver_is_next, 800, every_s=0.2, alive=lambda: process.poll() is None)
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"after {killed}: {(tmp_path / 'log').read_text()[-3000:]}") from error
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        log.close()
    assert killed == list(victims)
    assert not [orphan for orphan in orphans if runs(orphan)], "engines outlive their actors"
    before = metrics(run, "grpo")
    # what a run is computed with may change on the way: twice the learners and engines, or one of both if the test is
    # one of a sample, and other micro-batches
    doubled = ["learners=2", "rollout_actors=2"]
    more = (
        *(doubled if thorough else [chance.choice(doubled)]),
        "micro_batch_size=1",
        "learner_resources.cpus=0.3",
        "rollout_resources.cpus=0.3",
    )
    with recovery("grpo", "driver"):
        again = lorapar("grpo", *arguments, *(f"--set=grpo.{change}" for change in more))
    assert again.returncode == 0, again.stderr
    lines = metrics(run, "grpo")
    assert len(lines) == STEPS
    kept = len(before) - 1  # what a step wrote before its checkpoint was there is done again
    assert lines[:kept] == before[:kept]
    # the coordinator takes its engines and its count with it
    since = killed[killed.index("ray::Coordinator") :] if "ray::Coordinator" in killed else killed
    assert before[-1]["engines_replaced"] <= len(set(ENGINES) & set(since)), "an engine was replaced that had not died"
    assert all(line["staleness_max"] <= 1 for line in lines)
    assert sum(len(line["prompts"]) for line in lines) == 2 * STEPS
    prompts = json.loads((run / "manifest.json").read_text())["stages"]["grpo"]["prompts"]
    require_each_step_and_prompt_once(lines, prompts)
    ours, start = (load_file(run / name / "adapter" / "adapter_model.safetensors") for name in ("grpo", "sft"))
    assert ours.keys() == start.keys()
    assert any(not torch.equal(ours[key], start[key]) for key in ours)
