"""The files of `cluster/` are valid by the published schemas, and everything that they name exists."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lorapar_ray.config_file import load_config
from lorapar_ray.pipeline import STAGES
from lorapar_ray.run_lock import JOB_WAIT_S, STALE_S
from tests.tiny_run import ROOT

CLUSTER = ROOT / "cluster"
SCHEMAS = Path(__file__).parent / "schemas"
GPU = "nvidia.com/gpu"
CUSTOM = ["kuberay/cluster.yaml", "kuberay/job.yaml", "kueue/queues.yaml"]
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
TARGETS = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.M))


def documents(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((CLUSTER / name).read_text()) if each]


def schema(name: str) -> Any:
    return json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))


def strict(node: Any) -> Any:
    """A custom resource's schema that refuses unknown fields; Kubernetes would ignore them silently."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    found = {key: strict(value) for key, value in node.items()}
    if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def problems(document: Any, against: Any) -> list[str]:
    found = jsonschema.Draft7Validator(against).iter_errors(document)
    return [f"{each.json_path}: {each.message[:200]}" for each in found]


def against(document: dict[str, Any]) -> Any:
    """The schema of a custom resource; of its metadata only the name is required (the API server checks the rest)."""
    found = strict(schema(f"{document['apiVersion'].replace('/', '_')}_{document['kind']}"))
    found["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return found


def walk(node: Any) -> Any:
    yield node
    for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(each)


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_resources_are_valid(name: str) -> None:
    for document in documents(name):
        assert problems(document, against(document)) == []


def test_a_misspelt_field_is_found() -> None:
    [document] = documents("kuberay/cluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["contaners"] = []
    document["spec"]["authOptions"]["mode"] = "tokens"
    found = "\n".join(problems(document, against(document)))
    assert "'contaners' was unexpected" in found and "'tokens' is not one of" in found


def test_compose_and_ray_up_are_valid() -> None:
    import ray

    [compose] = documents("compose.yaml")
    extension = compose.pop("x-node")
    assert extension and problems(compose, schema("compose")) == []
    ray_up = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    [cluster] = documents("aws/cluster.yaml")
    assert problems(cluster, ray_up) == []


def test_the_job_brings_the_cluster_that_stands_alone() -> None:
    [cluster], [job] = documents("kuberay/cluster.yaml"), documents("kuberay/job.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_ray_is_the_lock_s_everywhere(lock: str) -> None:
    [locked] = re.findall(r"^ray==(\S+)", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.M)
    said = {
        str(file.relative_to(CLUSTER)): found
        for file in CLUSTER.rglob("*.yaml")
        if (
            found := {
                node["rayVersion"]
                for node in walk(documents(str(file)))
                if isinstance(node, dict) and "rayVersion" in node
            }
        )
    }
    assert said == {"kuberay/cluster.yaml": {locked}, "kuberay/job.yaml": {locked}}


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def size_of(group: dict[str, Any]) -> dict[str, str]:
    requests: dict[str, str] = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    return requests


def test_the_job_s_config_fits_the_cluster() -> None:
    [job] = documents("kuberay/job.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    options: dict[str, list[str]] = {}
    for option, value in zip(words[2::2], words[3::2], strict=True):
        options.setdefault(option, []).append(value)
    inside = Path("/opt/lorapar_ray")
    assert f"WORKDIR {inside}" in DOCKERFILE
    assert (ROOT / Path(words[1]).relative_to(inside)).is_file()
    config = load_config(ROOT / Path(options["--config"][0]).relative_to(inside), options["--set"])
    spec = job["spec"]["rayClusterSpec"]
    workers = groups(spec)
    sizes = [(group, group["template"]["spec"]["containers"][0]["resources"]["requests"]) for group in workers.values()]
    most = {
        key: sum(group["maxReplicas"] * int(size[key]) for group, size in sizes) for key in ("cpu", "nvidia.com/gpu")
    }
    assert (config.cluster.max_cpus, config.cluster.max_gpus) == (most["cpu"], most["nvidia.com/gpu"])
    asked = {
        "teachers": [(each.replicas, each.resources) for each in config.label.teachers],
        "learners": [
            (config.score.workers, config.score.resources),
            (config.sft.workers, config.sft.resources),
            (config.grpo.learners, config.grpo.learner_resources),
        ],
        "rollouts": [
            (config.grpo.rollout_actors, config.grpo.rollout_resources),
            (1, config.evaluate.resources),
        ],
    }
    for name, processes in asked.items():
        assert workers[name]["labels"] == {"group": name}
        size = size_of(workers[name])
        for count, resources in processes:
            assert resources.nodes == {"group": name}
            assert resources.gpu_count <= int(size[GPU]) and resources.cpus <= int(size["cpu"])
            assert count <= workers[name]["maxReplicas"] * int(size[GPU])
    assert sum(count for count, _ in asked["teachers"]) <= workers["teachers"]["maxReplicas"]


def test_the_image_s_user_may_write_to_the_shared_storage() -> None:
    user = re.search(r"--uid (\d+) ray", DOCKERFILE)
    assert user is not None and f"USER {user[1]}\n" in DOCKERFILE
    uid = int(user[1])
    for name in ("kuberay/cluster.yaml", "kuberay/job.yaml"):
        pods = [
            node["spec"]
            for node in walk(documents(name))
            if isinstance(node, dict) and "containers" in node.get("spec", {})
        ]
        assert len(pods) == 4 and {pod["securityContext"]["fsGroup"] for pod in pods} == {uid}
    [cluster] = documents("aws/cluster.yaml")
    mount, owner = cluster["initialization_commands"]
    assert mount.startswith("mountpoint -q /shared ||") and owner == f"sudo chown {uid}:{uid} /shared"
    assert "/shared:/shared" in " ".join(cluster["docker"]["run_options"])
    for command in (mount, owner):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_images_claims_and_secrets_are_there() -> None:
    storage = documents("kuberay/storage.yaml")
    claims = {each["metadata"]["name"] for each in storage if each["kind"] == "PersistentVolumeClaim"}
    services = {each["metadata"]["name"] for each in storage if each["kind"] == "Service"}
    comments = (CLUSTER / "kuberay/storage.yaml").read_text()
    for file in CLUSTER.rglob("*.yaml"):
        for node in walk(list(yaml.safe_load_all(file.read_text()))):
            if not isinstance(node, dict):
                continue
            image = node.get("image")
            if isinstance(image, str) and "lorapar-ray" in image:
                assert image.rpartition(":")[2] in TARGETS, file
            if "persistentVolumeClaim" in node:
                assert node["persistentVolumeClaim"]["claimName"] in claims
            if "redisAddress" in node:
                assert node["redisAddress"].partition(":")[0] in services
            if "secretKeyRef" in node and not node["secretKeyRef"].get("optional"):
                assert f"--from-literal={node['secretKeyRef']['key']}=" in comments


def test_the_queue_holds_the_job_at_its_full_size() -> None:
    [kustomization] = documents("kueue/kustomization.yaml")
    [job] = [each for name in kustomization["resources"] for each in documents(f"kueue/{name}")]
    for patch in kustomization["patches"]:
        assert (patch["target"]["kind"], patch["target"]["name"]) == (job["kind"], job["metadata"]["name"])
        for change in yaml.safe_load(patch["patch"]):
            *path, last = [int(key) if key.isdecimal() else key for key in change["path"].strip("/").split("/")]
            place = job
            for key in path:
                place = place[key]
            assert change["op"] == "add" or last in place
            place[last] = change["value"]
    assert problems(job, against(job)) == []
    spec = job["spec"]["rayClusterSpec"]
    assert all(group["replicas"] == group["maxReplicas"] for group in groups(spec).values())
    pods = [(1, spec["headGroupSpec"]), *((group["replicas"], group) for group in groups(spec).values())]
    queue = next(each for each in documents("kueue/queues.yaml") if each["kind"] == "ClusterQueue")
    for resource in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]:
        asked = 0
        for count, group in pods:
            asked += count * int(size_of(group).get(resource["name"], "0").removesuffix("Gi"))
        assert asked <= int(str(resource["nominalQuota"]).removesuffix("Gi")), resource["name"]


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for each in start.params for option in each.opts}


def test_commands_exist() -> None:
    known = ray_start_options()
    [compose], [ray_up] = documents("compose.yaml"), documents("aws/cluster.yaml")
    commands = [service["command"] for service in compose["services"].values()]
    commands += [
        each for key in ("head", "worker") for each in ray_up[f"{key}_start_ray_commands"] if " start " in each
    ]
    for command in commands:
        given = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
        assert given <= known, command
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY requirements/"):
            assert (ROOT / line.split()[1]).is_file(), line


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["pipeline", *STAGES])
def test_every_stage_has_its_job(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "jobs")
    for name in ("RAY_ADDRESS", "LORAPAR_WAIT_S"):  # which a job sets for its process
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{command}.py"), run_name="__main__")
    assert ended.value.code == 0 and "--run-dir" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [f"{command}.py", "--config", "run.yaml"])
    with pytest.raises(SystemExit, match="lorapar: --run-dir: give a directory that every node can reach"):
        runpy.run_path(str(ROOT / "jobs" / f"{command}.py"), run_name="__main__")


@pytest.mark.parametrize("model", [["--model", "package:smollm2"], ["--model=a"], ["-m", "a"], ["-ma"]])
def test_a_job_evaluates_models_without_a_run(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "jobs")
    for name in ("RAY_ADDRESS", "LORAPAR_WAIT_S"):
        monkeypatch.setenv(name, "0")
    for out, said in (
        ([], "lorapar: --out: give a directory that every node can reach"),
        (["--out", "results"], "lorapar: --out 'results': give its whole path"),
        (["-oresults"], "lorapar: --out 'results': give its whole path"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *model, *out])
        with pytest.raises(SystemExit, match=said):
            runpy.run_path(str(ROOT / "jobs" / "evaluate.py"), run_name="__main__")
    begun: list[str] = []
    monkeypatch.setattr("lorapar_ray.cli.main", lambda: begun.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *model, "--out", "/shared/results"])
    runpy.run_path(str(ROOT / "jobs" / "evaluate.py"), run_name="__main__")
    assert begun[1:] == ["evaluate", *model, "--out", "/shared/results"]


def test_a_job_joins_its_cluster_and_waits_for_the_lock_of_a_killed_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "jobs")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", "run.yaml", "--run-dir", "/shared/runs/x"])
    names = ("RAY_ADDRESS", "LORAPAR_WAIT_S")
    seen: list[list[str | None]] = []
    monkeypatch.setattr("lorapar_ray.cli.main", lambda: seen.append([os.environ.get(name) for name in names]))
    for name in names:
        monkeypatch.setenv(name, "0")
    runpy.run_path(str(ROOT / "jobs" / "sft.py"), run_name="__main__")
    for name in names:  # the test's end takes away what the job sets
        monkeypatch.delenv(name)
    runpy.run_path(str(ROOT / "jobs" / "sft.py"), run_name="__main__")
    assert seen == [["0", "0"], ["auto", JOB_WAIT_S]]
    assert float(JOB_WAIT_S) > STALE_S


@pytest.mark.parametrize("words", [["--run-dir", "runs/x"], ["--run-dir=runs/x"], ["-d", "runs/x"], ["-druns/x"]])
def test_a_job_s_run_directory_is_a_whole_path(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "jobs")
    for name in ("RAY_ADDRESS", "LORAPAR_WAIT_S"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", "run.yaml", *words])
    with pytest.raises(SystemExit, match="lorapar: --run-dir 'runs/x': give its whole path"):
        runpy.run_path(str(ROOT / "jobs" / "sft.py"), run_name="__main__")
