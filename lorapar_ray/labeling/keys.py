"""Key of a cached vote: a digest of the teacher, its model's revision and the text of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapar_ray.config import LabelConfig, TeacherConfig
from lorapar_ray.files import digest, expanded
from lorapar_ray.fingerprints import Fingerprints
from lorapar_ray.labeling.prompts import rotations, voting_prompt
from lorapar_ray.models import PACKAGE_PREFIX, is_hub_name, package_version, resolve_model
from lorapar_ray.workers import on_a_worker

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
    """A teacher's weights: a package's version, a digest of a local directory, or a hub commit.

    Without a network the commit comes from the local hub cache; a remote model's revision comes from the config.
    """
    if teacher.kind != "serve":
        return teacher.revision or ""
    model = teacher.model
    if expanded(model, "teacher's model").is_dir() and not model.startswith(PACKAGE_PREFIX):
        return str(prints.of_input(resolve_model(model)))
    if is_hub_name(model):
        return hub_commit(model, teacher.revision or "main")
    here = package_version(model) if model.startswith(PACKAGE_PREFIX) else None
    return here or str(on_a_worker(weights_here, model))


def weights_here(model: str) -> str:
    """`revision` of a package or a directory on a machine that has it (a Ray task).

    Raises:
        UserError: this machine does not.
    """
    found = resolve_model(model)
    return str(package_version(model) if model.startswith(PACKAGE_PREFIX) else Fingerprints(Path()).of_input(found))


def hub_commit(model: str, wanted: str) -> str:
    """The commit of a branch or tag of a hub model, from the hub, else from the local cache."""
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().model_info(model, revision=wanted, timeout=10).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError):
        reference = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "refs" / wanted
        return reference.read_text(encoding="utf-8").strip() if reference.is_file() else wanted
