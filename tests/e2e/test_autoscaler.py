"""A cluster without a node that works, and Ray's own autoscaler: nodes join because a stage asks for them. A node is a
Ray node of this machine, which Ray's provider for its own tests starts."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

from lorapar_ray.runs import RunDirectory
from tests.cluster.test_scoring import same, scores_of
from tests.e2e.clusters import environment_of, job_cluster, new_token
from tests.e2e.twin import is_done
from tests.ports import free_port
from tests.tiny_run import ROOT, lorapar_here, save_tiny_student, tiny_config, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.long]
CPUS, MOST = 2, 2
MODULE = "ray.autoscaler._private.fake_multi_node.node_provider"
"""As its own type it needs a file that Ray's wheel lacks."""
UNUSED = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
"""Fields for machines that have to be reached and set up."""


def autoscaling(port: int) -> dict[str, Any]:
    """What `ray up` hands to the head: none to `MOST` nodes of `CPUS` cores each."""
    kinds = {FAKE_HEAD_NODE_TYPE: (0, 0), "work": (CPUS, MOST)}
    provider = {
        "type": "external",
        "module": f"{MODULE}.FakeMultiNodeProvider",
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    return {
        "cluster_name": "grows",
        "max_workers": MOST,
        "provider": provider | {"head_node_id": FAKE_HEAD_NODE_ID, "gcs_address": f"127.0.0.1:{port}"},
        "available_node_types": {
            name: {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": 0, "max_workers": most}
            for name, (cpus, most) in kinds.items()
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in UNUSED},
    }


def test_nodes_join_because_a_stage_asks_for_them(cluster: None, tmp_path: Path) -> None:
    config = tiny_config(save_tiny_student(tmp_path / "student"))
    config |= {"label": {"strategy": "random"}, "adapter": {"rank": 4, "alpha": 8, "init": "gaussian"}}
    alone, run = tmp_path / "alone", tmp_path / "run"
    file = write_config(tmp_path / "run.yaml", config)
    for command in (("label", "-d", run), ("label", "-d", alone), ("score", "-d", alone)):
        here = lorapar_here(*command, "-c", file)
        assert here.returncode == 0, here.stderr
    config["score"] |= {"workers": 2, "resources": {"cpus": CPUS, "threads": 1}}
    write_config(file, config)
    port, environment = free_port(), environment_of(new_token(), tmp_path)
    provided = tmp_path / "autoscaling.json"
    provided.write_text(json.dumps(autoscaling(port)))
    environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    environment |= dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
    command = ["python", ROOT / "jobs" / "score.py", "--config", file, "--run-dir", run]
    with job_cluster([["--num-cpus=0", f"--autoscaling-config={provided}"]], environment, port) as grows:
        refused = grows.wait(grows.submit(None, *command))
        done = grows.wait(grows.submit(None, *command, "--set", f"cluster.max_cpus={CPUS * MOST}"))
    assert refused[0] == "FAILED" and "score: asks for 2 CPU (workers 1 × 2) but the cluster has 0" in refused[1]
    assert done[0] == "SUCCEEDED", done[1][-3000:]
    assert "score waits for nodes: 2 CPU (workers 1 × 2), the cluster has 0 so far" in done[1]  # to make the adapter
    assert "score waits for nodes: 4 CPU (workers 2 × 2), the cluster has 2 so far" in done[1]
    assert is_done(run, "score")
    same(*(scores_of(RunDirectory(each)) for each in (run, alone)))
