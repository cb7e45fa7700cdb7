"""Pages from templates: one self-contained file; all text is escaped and without control characters."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lorapar_ray.text import shown


def rendered(template: str, **values: Any) -> str:
    """The HTML of a template of this folder, with the pages' style as `css`."""
    folder = files("lorapar_ray.reporting")
    environment = Environment(autoescape=True, finalize=_plain)
    css = folder.joinpath("style.css").read_text(encoding="utf-8")
    return environment.from_string(folder.joinpath(template).read_text(encoding="utf-8")).render(css=css, **values)


def _plain(value: Any) -> Any:
    """Foreign text without control characters; what is marked as safe, such as a plot, is ours and stays unchanged."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value
