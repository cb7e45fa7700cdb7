"""Stage 2 with environments of several turns: real engine, real learner, real environment worker.

Half of the rows are of a function of our own, half of an unmodified environment of the library `verifiers`. The engine
reads the policies from the learner's memory.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapar_ray.config import Config
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.grpo.environments.from_verifiers import rows
from lorapar_ray.pipeline import is_done
from lorapar_ray.running import run_stage
from lorapar_ray.runs import RunDirectory
from tests.e2e.environments import SEEDS, TURN_TOKENS, TURNS, spelling, told
from tests.e2e.rewards import letters
from tests.sft_run import weights
from tests.tiny_run import SOURCES, metrics, tiny_config
from tests.together import tasks_here

pytestmark = pytest.mark.e2e
STEPS, PROMPTS, GROUP = 2, 2, 4


def config_of(student: Path, questions: Path) -> Config:
    """Stage 2 alone, in which every row is drawn once."""
    plain = tiny_config(student)
    [own] = SOURCES["train"]
    grpo = {
        "steps": STEPS,
        "prompts_per_step": PROMPTS,
        "group_size": GROUP,
        "masked": False,
        "systems": [1, 2],
        "environment": "tests.e2e.environments:either",
        "rewards": [{"name": "environment"}],
        "max_completion_length": 96,
        "top_k": 20,
        "top_p": 0.9,
        "policy_transport": "direct",
    }
    return Config.model_validate(
        plain
        | {
            "order": ["grpo"],
            "data": {
                "train": [{**own, "rows": 2, "system": 1}, {"reader": "file", "path": str(questions), "system": 2}]
            },
            "label": {"strategy": "source"},
            "adapter": {"rank": 4, "alpha": 8, "init": "gaussian", "init_std": 0.05},
            "grpo": plain["grpo"] | grpo,
        }
    )


def test_episodes_of_several_turns_are_trained_on_as_the_engine_sampled_them(
    cluster: None, student: Path, tmp_path: Path
) -> None:
    episodes, questions = tmp_path / "episodes.jsonl", tmp_path / "questions.jsonl"
    found = [{**row, "info": {"episodes": str(episodes)}} for row in rows(spelling())]
    questions.write_text("".join(json.dumps(row) + "\n" for row in found))
    config, run = config_of(student, questions), RunDirectory(tmp_path / "run")
    run.open(config)
    with tasks_here():
        for stage in ("label", "score", "partition", "grpo"):
            run_stage(config, run, stage)
    lines = metrics(run.root, "grpo")
    assert is_done(config, run, "grpo") and [line["policy_version"] for line in lines] == [1, 2]
    assert sum(line["environment_failures"] for line in lines) == 1
    for line in lines:
        assert line["turns"] == TURNS and line["completion_length"] <= TURN_TOKENS * TURNS < line["trajectory_length"]
        assert line["reward"] == line["reward/environment"] > 0
        assert line["logprob_gap"] <= 1e-3  # of every turn, after the environment's tokens, over the kept sets
        assert 0.99 <= line["ratio_min"] <= line["ratio_max"] <= 1.01
        assert line["canary_gap"] < 0.01
    before, after = weights(run.adapter), weights(run.grpo / "adapter")
    assert all(not torch.equal(before[key], value) for key, value in after.items())
    played = [json.loads(line) for line in episodes.read_text().splitlines()]
    assert len(played) == GROUP * len(SEEDS)
    told_of = {sample["prompt"]: sample for sample in metrics(run.root, "samples")}
    for seed in SEEDS:
        check_game(student, seed, played, told_of[f"Spell {seed}."])


def check_game(student: Path, seed: int, played: list[dict[str, Any]], trained: dict[str, Any]) -> None:
    """Every episode of a game: its tokens are the engine's and the game's, its reward is the rubric's. The learner's
    record of the best one has these tokens."""
    encoder = load_encoder(str(student), None)
    begin = encoder.prompt_ids(f"Spell {seed}.")
    own = [episode for episode in played if episode["turns"][0][0] == begin]
    assert len(own) == GROUP
    texts = {}
    for episode in own:
        chat, said = begin, []
        assert len(episode["turns"]) == TURNS
        for number, (asked, answered) in enumerate(episode["turns"]):
            if number:
                message = [{"role": "user", "content": told(seed, number)}]
                added = encoder.continuation_ids(message)
                chat = chat + added[chat[-1] in encoder.end_ids :]
            assert asked == chat and 0 < len(answered) <= TURN_TOKENS
            chat, said = chat + answered, [*said, encoder.answer_text(answered)]
        rubric = sum(letters([], [text])[0] for text in said[:-1])  # the game's last step is before the last answer
        assert episode["reward"] == pytest.approx(rubric)
        texts[encoder.tokenizer.decode(chat[len(begin) :])] = episode["reward"]
    assert texts[trained["completion"]] == trained["reward"] == max(texts.values())
