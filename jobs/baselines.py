"""Stage 1 and its baselines in one harness: the same rows, steps and evaluation, a run directory each, one table.

    python jobs/baselines.py [--config FILE] [--data FOLDER] [--out FOLDER] [--only NAME ...] [--seeds N ...]
                             [--stage NAME] [--set SECTION.KEY=VALUE ...]

A variant is the config with a few settings changed (VARIANTS). Labels, adapters and scores that two variants share are
made once and copied. Finished stages are skipped, so that the command can be stopped and repeated; `--stage sft` runs
one stage and what it needs. The table (also `table.md` in --out) holds what is finished.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lorapar_ray.config import Config
from lorapar_ray.config_file import load_config
from lorapar_ray.evaluation import wilson_interval
from lorapar_ray.pipeline import PIPELINE, is_done, run_stage, stages_of
from lorapar_ray.runs import RunDirectory
from lorapar_ray.session import ray_session
from lorapar_ray.standing import inputs_of

PLAIN = "sft.masked=false"
VARIANTS: dict[str, list[str]] = {
    "lora": [PLAIN, "evaluate.models=[base, sft]"],
    "lora+": [PLAIN, "sft.lora_plus_ratio=8"],
    "olora": [PLAIN, "adapter.init=olora"],
    "pissa": [PLAIN, "adapter.init=pissa"],
    "qlora": [PLAIN, "model.quantization=nf4"],
    "lora-par": [],
    "lora-par-pissa": ["adapter.init=pissa"],
    "random-mask": ["partition.mask=random"],
    "random-mask-pissa": ["partition.mask=random", "adapter.init=pissa"],
    "taylor1": ["score.criterion=taylor1"],
    "magnitude": ["score.criterion=magnitude"],
    "lora-2-epochs": [PLAIN, "sft.epochs=2"],
    "lora-then-rl": [PLAIN, "grpo.masked=false", "order=[sft, grpo]", "evaluate.models=[sft, grpo]"],
    "rl-then-lora": [PLAIN, "grpo.masked=false", "order=[grpo, sft]", "evaluate.models=[grpo, sft]"],
    "prompt-tuning": [PLAIN, "adapter.method=prompt_tuning", "sft.learning_rate=0.03"],
    "p-tuning": [PLAIN, "adapter.method=p_tuning", "sft.learning_rate=0.003"],
    "prefix-tuning": [PLAIN, "adapter.method=prefix_tuning", "sft.learning_rate=0.03"],
    "ia3": [PLAIN, "adapter.method=ia3", "sft.learning_rate=0.005"],
}
SHARED = {
    "label": ("labels", "data", "rejects", "metrics/labels.json"),
    "score": ("adapter", "scores"),
}
LOCAL = {"mawps": "llm_adapters/mawps/{split}set.json", "svamp": "svamp/SVAMP.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("jobs/configs/arithmetic.yaml"))
    parser.add_argument(
        "--data", type=Path, help="folder with the local copies of MAWPS and SVAMP that the config reads"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1])
    parser.add_argument("--stage", choices=["label", "score", "partition", "sft", "grpo", "evaluate"])
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="overrides for every variant")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for name in arguments.only:
            config = load_config(arguments.config, [*VARIANTS[name], f"seed={seed}", *local(arguments), *arguments.set])
            print(f"{name}, seed {seed}", flush=True)
            execute(config, RunDirectory((arguments.out / f"{name}-{seed}").absolute()), arguments.stage)
    table = "\n".join(rows_of(arguments.out))
    (arguments.out / "table.md").write_text(table + "\n")
    print(table)


def local(arguments: argparse.Namespace) -> Iterator[str]:
    """Overrides that read the sets from `--data`."""
    if arguments.data is not None:
        data = load_config(arguments.config).data
        if not {source.reader for source in (*data.train, *data.test)} <= LOCAL.keys():
            raise SystemExit(f"--data: only {' and '.join(LOCAL)} lie in a folder; {arguments.config} reads others")
        for part, sources in (("train", data.train), ("test", data.test)):
            for index, source in enumerate(sources):
                path = arguments.data / LOCAL[source.reader].format(split=getattr(source, "split", "train"))
                yield f"data.{part}.{index}.path={path}"


def execute(config: Config, run: RunDirectory, last: str | None) -> None:
    """Run the stages up to `last`, taking from sibling runs what they have made of the same inputs."""
    stages = [name for name in stages_of(config) if name != "report"]
    if last is not None and last not in stages:
        raise SystemExit(f"--stage {last}: not in the config's order [{', '.join(config.order)}]")
    stages = stages[: stages.index(last) + 1] if last else stages
    run.open(config)
    for name in SHARED:
        borrow(config, run, name)
    if all(is_done(config, run, name) for name in stages):
        return
    with ray_session():
        for name in stages:
            run_stage(config, run, name)


def borrow(config: Config, run: RunDirectory, stage: str) -> None:
    """Copy `stage` from a sibling run that finished it on the same inputs."""
    if is_done(config, run, stage):
        return
    wanted = inputs_of(PIPELINE[stage], config, run.manifest()["stages"], run.fingerprints)
    for sibling in sorted(run.root.parent.iterdir()):
        entry = RunDirectory(sibling).manifest().get("stages", {}).get(stage, {})
        if entry.get("status") == "done" and entry.get("inputs") == wanted:
            for part in SHARED[stage]:
                if (sibling / part).is_dir():
                    shutil.copytree(sibling / part, run.root / part, dirs_exist_ok=True)
                elif (sibling / part).is_file():
                    (run.root / part).parent.mkdir(exist_ok=True)
                    shutil.copy2(sibling / part, run.root / part)
            run.record(stage, **entry)
            return


def rows_of(out: Path) -> Iterator[str]:
    """The table in Markdown: a line per variant, the seeds' right answers added up, each seed's accuracy beside."""
    yield "| method | active | steps | accuracy | 95 % interval | n | by seed | SFT seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    found = [("base", "lora", "base"), *((name, name, "last") for name in VARIANTS)]
    for label, variant, which in found:
        runs = [path for path in sorted(out.glob(f"{variant}-*")) if path.name.removeprefix(f"{variant}-").isdigit()]
        if line := _line(label, runs, which):
            yield line


def _line(label: str, runs: Sequence[Path], which: str) -> str | None:
    results, shares, steps, seconds = [], [], 0, []
    for run in runs:
        name = "base" if which == "base" else yaml.safe_load((run / "config.yaml").read_text())["order"][-1]
        file = run / "eval" / f"{name}.json"
        if not file.is_file():
            continue
        results.append(json.loads(file.read_text()))
        if which != "base":
            lines = [json.loads(line) for line in (run / "metrics" / "sft.jsonl").read_text().splitlines()]
            shares.append(lines[-1]["active_share"])
            steps = lines[-1]["step"]
            seconds.append(sum(line["seconds"] for line in lines))
    if not results:
        return None
    results = results[:1] if which == "base" else results  # the base knows no seed
    correct, n = sum(each["correct"] for each in results), sum(each["n"] for each in results)
    low, high = wilson_interval(correct, n)
    cells = [
        label,
        f"{sum(shares) / len(shares):.1%}" if shares else "–",
        str(steps) if steps else "–",
        f"{correct / n:.1%}",
        f"{low:.1%} – {high:.1%}",
        str(n),
        ", ".join(f"{each['accuracy']:.1%}" for each in results),
        ", ".join(f"{each:.0f}" for each in seconds) or "–",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
