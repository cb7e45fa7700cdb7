"""Whether a tracker has its client and its key on this machine. Only files and environment variables are read: no
tracker's client is imported, and no server is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com")
"""Names of W&B's own server; `wandb login` writes down the one that its version knows."""
WITHOUT_SERVER = ("offline", "dryrun", "disabled")
"""Values of W&B's mode that send nothing."""


def missing(tracker: str, environment: Mapping[str, str] = os.environ) -> str:
    """What this machine lacks for a tracker, and how to get it, in words; empty if it lacks nothing.

    Args:
        tracker: `tensorboard`, `wandb` or `mlflow`.
        environment: of the process that would write the curves.
    """
    if find_spec(tracker) is None:
        return f"is not installed; pip install {tracker}"
    keys: dict[str, Callable[[Mapping[str, str]], str]] = {"wandb": _wandb, "mlflow": _mlflow}
    return keys[tracker](environment) if tracker in keys else ""


def _wandb(environment: Mapping[str, str]) -> str:
    """W&B takes its key from the environment, from the netrc file of `wandb login`, or from its settings files."""
    settings = _wandb_settings(environment)
    if (environment.get("WANDB_MODE") or settings.get("mode")) in WITHOUT_SERVER:
        return ""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return ""
    server = environment.get("WANDB_BASE_URL") or settings.get("base_url") or f"https://{WANDB_HOSTS[0]}"
    host = urlsplit(server).netloc.rpartition("@")[2]
    if any(_in_netrc(each, environment) for each in (WANDB_HOSTS if host in WANDB_HOSTS else (host,))):
        return ""
    return f"has no key for {host}; set WANDB_API_KEY, or WANDB_MODE=offline"


def _wandb_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What `wandb login` and `wandb offline` have written for the user, and for this directory, which comes first."""
    user = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    here = Path(environment.get("WANDB_DIR") or ".")
    files = (user / "settings", *(here / name / "settings" for name in (".wandb", "wandb")))
    return {key: value for file in files for key, value in _ini(file).get("default", {}).items()}


def _in_netrc(host: str, environment: Mapping[str, str]) -> bool:
    given = environment.get("NETRC")
    for file in [given] if given else ["~/.netrc", "~/_netrc"]:
        try:
            login = netrc(Path(file).expanduser()).authenticators(host)
        except (OSError, ValueError, NetrcParseError):
            continue
        if login is not None and login[2]:
            return True
    return False


def _mlflow(environment: Mapping[str, str]) -> str:
    """A server of one's own may need no login; half a login is never sent. Databricks always needs one."""
    given = _ini(Path("~/.mlflow/credentials").expanduser()).get("mlflow", {})
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    without = [name for name in names if not (environment.get(name) or given.get(name.lower()))]
    if len(without) == 1 and not environment.get("MLFLOW_TRACKING_TOKEN"):
        [has] = set(names) - set(without)
        return f"has {has} without {without[0]}; set both, or none"
    server = environment.get("MLFLOW_TRACKING_URI", "").partition("://")[0]
    if server == "databricks" and not _for_databricks(environment):
        return "has no key for Databricks; set DATABRICKS_HOST and DATABRICKS_TOKEN"
    return ""


def _for_databricks(environment: Mapping[str, str]) -> bool:
    """Whether there is anything from which Databricks' client may make a login, of which it knows many kinds."""
    file = Path(environment.get("DATABRICKS_CONFIG_FILE") or "~/.databrickscfg").expanduser()
    return file.is_file() or any(name.startswith(("DATABRICKS_", "ARM_")) for name in environment)


def _ini(file: Path) -> dict[str, dict[str, str]]:
    """A file's sections; none if it cannot be read."""
    found = ConfigParser(interpolation=None)
    try:
        found.read_string(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError):
        return {}
    return {name: dict(found[name]) for name in found.sections()}
