"""What a cached vote belongs to: the teacher, its model's revision and the text of the prompt, as one digest."""

from __future__ import annotations

from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.files import digest
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.labeling.prompts import rotations, voting_prompt
from lorapar_ray.models import PACKAGE_PREFIX, PACKAGED, resolve_model

ASKED_OF = ("name", "kind", "model", "use_chat_template", "thinking_tokens", "base_url", "endpoint", "extra_body")


def teacher_keys(label: LabelConfig, teacher: TeacherConfig, student: str, prints: Fingerprints) -> list[bytes]:
    """One 16-byte key per prompt that the teacher is asked for a question (see `prompts.rotations`).

    Settings that change how fast a teacher answers (replicas, batch sizes, limits) are not part of it.

    Args:
        prints: of a local teacher's files.
    """
    who: dict[str, Any] = {name: getattr(teacher, name) for name in ASKED_OF}
    who |= {"dtype": teacher.engine.dtype, "engine": teacher.engine.extra, "revision": revision(teacher, prints)}
    prompts = (
        voting_prompt("{question}", "{answer}", label=label, teacher=teacher, student=student, rotation=rotation)
        for rotation in rotations(label)
    )
    return [bytes.fromhex(digest({"teacher": who, "prompt": prompt}))[:16] for prompt in prompts]


def revision(teacher: TeacherConfig, prints: Fingerprints) -> str:
    """Which weights a teacher runs: a package's version, what a local directory's files hold, or a hub commit.

    Without a network the commit is the one in the local hub cache; a remote model's is what the config says.
    """
    if teacher.kind != "serve":
        return teacher.revision or ""
    if teacher.model.startswith(PACKAGE_PREFIX):
        module = PACKAGED[teacher.model.removeprefix(PACKAGE_PREFIX)][0]
        return version(packages_distributions()[module][0])
    model = resolve_model(teacher.model)
    if Path(model).is_dir():
        return str(prints.of_input(model))
    return hub_commit(model, teacher.revision or "main")


def hub_commit(model: str, wanted: str) -> str:
    """The commit that a branch or tag of a hub model stands for, from the hub, else from the local cache."""
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().model_info(model, revision=wanted, timeout=10).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError):
        reference = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "refs" / wanted
        return reference.read_text().strip() if reference.is_file() else wanted
