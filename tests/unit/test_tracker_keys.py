"""What a tracker lacks on a machine. W&B's cases were compared with its own client (0.31)."""

from pathlib import Path

import pytest

from lorapar_ray import tracker_keys
from lorapar_ray.config import Config
from lorapar_ray.tracker_check import remote_trackers
from lorapar_ray.tracker_keys import missing

KEY = "a" * 40
NO_KEY = "has no key for api.wandb.ai; set WANDB_API_KEY, or WANDB_MODE=offline"
LOGIN = "machine {}\n  login user\n  password " + KEY + "\n"
SETTINGS = ".config/wandb/settings"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory, of a machine on which every tracker is installed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracker_keys, "find_spec", lambda name: object())
    return tmp_path


def put(home: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)


@pytest.mark.parametrize(
    ("environment", "files"),
    [
        ({"WANDB_API_KEY": KEY}, {}),
        ({"WANDB_IDENTITY_TOKEN_FILE": "/run/token"}, {}),
        *(({"WANDB_MODE": mode}, {}) for mode in ("offline", "dryrun", "disabled")),
        ({}, {SETTINGS: "[default]\nmode = offline\n"}),
        ({}, {"wandb/settings": "[default]\nmode = offline\n"}),
        ({}, {SETTINGS: f"[default]\napi_key = {KEY}\n"}),
        ({}, {".netrc": LOGIN.format("api.wandb.ai")}),
        ({}, {".netrc": LOGIN.format("api.forge.coreweave.com")}),
        ({"NETRC": "~/logins"}, {"logins": LOGIN.format("api.wandb.ai")}),
        ({"WANDB_BASE_URL": "http://w.org:8080"}, {".netrc": LOGIN.format("w.org:8080")}),
        ({}, {SETTINGS: "[default]\nbase_url = https://w.org\n", ".netrc": LOGIN.format("w.org")}),
    ],
)
def test_wandb_with_a_key_or_without_a_server(home: Path, environment: dict[str, str], files: dict[str, str]) -> None:
    put(home, files)
    assert missing("wandb", environment) == ""


@pytest.mark.parametrize(
    ("environment", "files", "said"),
    [
        ({}, {}, NO_KEY),
        ({"WANDB_API_KEY": "", "WANDB_MODE": "online"}, {}, NO_KEY),
        ({"WANDB_MODE": "online"}, {SETTINGS: "[default]\nmode = offline\n"}, NO_KEY),
        ({}, {SETTINGS: "mode = offline"}, NO_KEY),
        ({}, {".netrc": LOGIN.format("w.org")}, NO_KEY),
        ({}, {".netrc": "machine"}, NO_KEY),
        ({"WANDB_BASE_URL": "https://w.org"}, {}, NO_KEY.replace("api.wandb.ai", "w.org")),
        ({"WANDB_BASE_URL": "https://me:secret@w.org"}, {}, NO_KEY.replace("api.wandb.ai", "w.org")),
    ],
)
def test_wandb_without_a_key(home: Path, environment: dict[str, str], files: dict[str, str], said: str) -> None:
    put(home, files)
    assert missing("wandb", environment) == said


@pytest.mark.parametrize(
    ("environment", "files", "said"),
    [
        ({}, {}, ""),
        ({"MLFLOW_TRACKING_URI": "http://m.org:5000"}, {}, ""),  # it may ask nobody for a login
        ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "x"}, {}, ""),
        ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_TOKEN": "x"}, {}, ""),
        (
            {"MLFLOW_TRACKING_USERNAME": "me"},
            {},
            "has MLFLOW_TRACKING_USERNAME without MLFLOW_TRACKING_PASSWORD; set both, or none",
        ),
        (
            {"MLFLOW_TRACKING_PASSWORD": "x"},
            {},
            "has MLFLOW_TRACKING_PASSWORD without MLFLOW_TRACKING_USERNAME; set both, or none",
        ),
        (
            {"MLFLOW_TRACKING_USERNAME": "me"},
            {".mlflow/credentials": "[mlflow]\nmlflow_tracking_password = x%y\n"},
            "",
        ),
        (
            {"MLFLOW_TRACKING_URI": "databricks"},
            {},
            "has no key for Databricks; set DATABRICKS_HOST and DATABRICKS_TOKEN",
        ),
        ({"MLFLOW_TRACKING_URI": "databricks://mine", "DATABRICKS_TOKEN": "x"}, {}, ""),
        ({"MLFLOW_TRACKING_URI": "databricks"}, {".databrickscfg": "[DEFAULT]\n"}, ""),
    ],
)
def test_mlflow(home: Path, environment: dict[str, str], files: dict[str, str], said: str) -> None:
    put(home, files)
    assert missing("mlflow", environment) == said


def test_tensorboard_needs_no_key_and_each_tracker_its_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing("tensorboard", {}) == ""
    monkeypatch.setattr(tracker_keys, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        assert missing(name, {"WANDB_MODE": "offline"}) == f"is not installed; pip install {name}"


def test_each_stage_that_trains_names_its_trackers() -> None:
    """So does scoring, if it begins with a warm-up."""
    source = {"reader": "file", "path": "rows.jsonl"}
    plain = {"name": "x", "model": {"path": "m"}, "data": {"train": [source]}, "label": {"strategy": "random"}}
    parts = {"sft": {"report_to": ["tensorboard", "wandb"]}, "grpo": {"report_to": ["mlflow"]}}
    for init, warm in (("default", ["wandb"]), ("pissa", [])):
        config = Config.model_validate(plain | parts | {"adapter": {"init": init}})
        found = {stage: remote_trackers(config, stage) for stage in ("label", "score", "sft", "grpo", "evaluate")}
        assert found["score"] == (warm, "sft.report_to") and found["sft"] == (["wandb"], "sft.report_to")
        assert found["grpo"] == (["mlflow"], "grpo.report_to") and not found["label"][0] + found["evaluate"][0]
