"""The tiny run on several machines: the places of its parts, and its submission from another machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.hosts.machines import SHARED
from tests.hosts.topology import Topology
from tests.tiny_run import tiny_config, write_config

STEPS = 8
TRAINING = {"cpus": 1.5, "threads": 1, "nodes": {"group": "in(teachers,training)"}}
"""A node has two CPUs, so two of these need two nodes."""
ENGINES = {"cpus": 1, "nodes": {"group": "engines"}}
ONE_BY_ONE = {"max_num_seqs": 1, "extra": {"enable_prefix_caching": False}}
"""Stage 2's engine computes each sequence alone. Else the last bits of its probabilities depend on which sequences
share a batch, and that on timing; now and then they decide which token is sampled."""
REWARD = '''
def letters(prompts, completions, **_):
    """Share of characters that are lower-case letters."""
    return [sum(c.islower() for c in text) / max(1, len(text)) for text in completions]
'''


class Sent(NamedTuple):
    """The files and the run of a client."""

    cluster: Topology
    folder: Path
    """Sent to the cluster; its machines see nothing else of the client."""
    shared: Path
    """The folder that they see as `SHARED`; a real cluster's client does not see it."""

    def submit(self, run: str, *options: str) -> subprocess.Popen[str]:
        """Start `lorapar submit` in the folder; standard error goes to standard output."""
        return subprocess.Popen(
            self.command(run, *options),
            cwd=self.folder,
            env=self.cluster.client(HOME=str(self.folder.parent)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def command(self, run: str, *options: str) -> Sequence[str]:
        """That command line."""
        given = ["run.yaml", "--run-dir", f"{SHARED}/{run}", "--address", self.cluster.address, *options]
        return [sys.executable, "-m", "lorapar_ray.cli", "submit", *given]


def placed_config() -> dict[str, Any]:
    """The tiny config with a machine for each part, and a reward that is only in the folder."""
    config = tiny_config(Path(SHARED, "student"))
    for teacher in config["label"]["teachers"]:
        teacher["resources"] |= {"nodes": {"group": "teachers"}}
    config["score"] |= {"workers": 2, "resources": TRAINING, "unit_size": 1}
    config["sft"] |= {"workers": 2, "resources": TRAINING, "epochs": 2}
    config["grpo"] |= {"learners": 2, "learner_resources": TRAINING, "rollout_resources": ENGINES, "steps": STEPS}
    config["grpo"] |= {"rewards": [{"name": "my_rewards:letters"}]}
    config["grpo"]["rollout_engine"] = {**config["grpo"]["rollout_engine"], **ONE_BY_ONE}
    config["evaluate"] |= {"resources": ENGINES}
    return config


def write_sent(folder: Path) -> Path:
    """The folder with config and reward."""
    write_config(folder / "run.yaml", placed_config())
    (folder / "my_rewards.py").write_text(REWARD)
    return folder
