"""The keys of remote teachers: their source, and a warning if they are sent unencrypted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from lorapar_ray.config import TeacherConfig
from lorapar_ray.errors import UserError
from lorapar_ray.progress import console
from lorapar_ray.redact import has_secret, is_variable, remember
from lorapar_ray.text import markup

_KEY = re.compile(r"[!-~]+")
"""Characters allowed in an HTTP header: printable ASCII without spaces."""
_HERE = re.compile(r"localhost|.*\.localhost|127(?:\.\d{1,3}){3}|::1", re.IGNORECASE)


def secrets(teachers: Iterable[TeacherConfig]) -> dict[str, str]:
    """The key of each teacher that has one, by name; see `secret`."""
    return {teacher.name: key for teacher in teachers if (key := secret(teacher)) is not None}


def secret(teacher: TeacherConfig) -> str | None:
    """The key that the config names, from this process's environment, without the spaces around it.

    Raises:
        UserError: the variable is not set, or its value cannot be a key. The message does not hold the value.
    """
    name = teacher.api_key_env
    if name is None:
        return None
    # the user may have written the key itself there; messages must not contain it
    variable = f"environment variable {name}" if is_variable(name) else "the variable that api_key_env names"
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"teacher '{teacher.name}': {variable} is not set; export it")
    if not _KEY.fullmatch(key):
        raise UserError(
            f"teacher '{teacher.name}': {variable} holds spaces or control characters, so it is not an API key; export "
            "it again"
        )
    remember([key])
    return key


def warn_of_plain_http(teachers: Iterable[TeacherConfig], keys: Mapping[str, str]) -> None:
    """Say which secrets would cross a network unencrypted."""
    for teacher in teachers:
        url = urlsplit(teacher.base_url or "")
        open_road = url.scheme == "http" and not _HERE.fullmatch(url.hostname or "")
        if open_road and (teacher.name in keys or has_secret([teacher.base_url, teacher.extra_body])):
            console.print(
                f"  [yellow]teacher {teacher.name}[/]: its key goes to {markup(url.hostname)} over plain http, where "
                "others can read it; use https",
                markup=True,
            )
