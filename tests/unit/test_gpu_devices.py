"""Which GPUs of a machine a plan counts. The driver's tool is simulated by a script on the path."""

from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.config import Config
from lorapar_ray.doctor import _device
from lorapar_ray.gpu_memory.device import Device, device_of

GIB = 2**30
UUIDS = [f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "abc"]
CONFIG = {
    "name": "x",
    "model": {"path": "m"},
    "data": {"train": [{"reader": "file", "path": "rows.jsonl"}]},
    "label": {"teachers": [{"name": name, "model": "m"} for name in "abc"]},
}


@pytest.fixture(autouse=True)
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80, 80 and 40 GiB, on a machine whose packages are built for GPUs."""
    tool = tmp_path / "nvidia-smi"
    lines = [f"{uuid}, {mib}" for uuid, mib in zip(UUIDS, (81920, 81920, 40960), strict=True)]
    tool.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("lorapar_ray.gpu_memory.device.uses_gpus", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def planned(**cluster: Any) -> Device:
    return device_of(Config.model_validate(CONFIG | {"cluster": cluster}))


@pytest.mark.parametrize(
    ("value", "count", "memory"),
    [
        ("0", 1, 80 * GIB),
        (" 1, 2", 2, 40 * GIB),
        (UUIDS[1], 1, 80 * GIB),
        ("GPU-b,GPU-c", 2, 40 * GIB),
        ("GPU-", 0, None),  # of several
        ("0,9,1", 1, 80 * GIB),  # CUDA stops at the first that is none
        ("-1", 0, None),
        ("NoDevFiles", 0, None),
        ("", 0, None),
        ("MIG-4c2f", 1, None),
    ],
)
def test_a_plan_counts_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, value: str, count: int, memory: float | None
) -> None:
    assert planned() == Device(3, 40 * GIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert planned() == Device(count, memory)


def test_the_gpus_of_a_cluster_are_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planned(max_gpus=8, gpu_memory_gib=141) == Device(8, 141 * GIB)


def test_packages_of_a_cpu_use_no_gpu_and_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("versions", "gpu_memory.device"):
        monkeypatch.setattr(f"lorapar_ray.{module}.uses_gpus", lambda: False)
    assert planned() == Device(0, None)
    found = _device()
    assert found.ok and "3 GPU unused" in found.detail and "requirements/gpu.txt" in found.detail
    assert "\n" not in found.detail


def test_no_tool_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert planned() == Device(0, None)
