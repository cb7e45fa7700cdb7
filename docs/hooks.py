"""What mkdocs does beside its own work: the config reference out of the code, and links that leave `docs/`."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lorapar_ray.config import Config, Section, base, ranges  # noqa: E402
from lorapar_ray.config.marks import Mark, mark_of  # noqa: E402

LINK = re.compile(r"\[([^\]\[]+)\]\(((?:\.\./)+[^)\s]+)\)")
INTRODUCTION = """# Config reference

Every field, as `lorapar_ray/config` defines it; this page is made from there. A config is one YAML file with the
fields of `Config`; an unknown field, a wrong type and an impossible combination are refused before anything starts.
`--set section.key=value` overrides a field, `lorapar run CONFIG --dry-run` prints the whole with its defaults.

**Counts as** says what a change does to a run that has begun. A *result* field decides what comes out: with another
value the stage's result is out of date, and `--redo STAGE` replaces it. An *operation* field says how it is computed;
it may change at any time, and the run goes on from where it is.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the config reference."""
    files.append(File.generated(config, "reference/config.md", content=config_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Name files of the repository that are no pages of the site, instead of linking to them."""
    folder = Path(page.file.src_uri).parent

    def plain(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = os.path.normpath(Path("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            raise ValueError(f"{page.file.src_uri}: '{target}' is not in the repository")
        return f"`{path}`" if text.startswith("`") else f"{text} (`{path}`)"

    return LINK.sub(plain, markdown)


def config_reference() -> str:
    """The page: one table for each section of the config, in the order of the tree."""
    parts = [INTRODUCTION]
    parts += [_section(section) for section in dict.fromkeys(_sections(Config))]
    parts.append("## Types\n\n| type | values |\n| --- | --- |\n" + "".join(_types()))
    return "\n".join(parts)


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for info in section.model_fields.values():
        for each in _sections_in(info.annotation):
            yield from _sections(each)


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [each for part in get_args(annotation) for each in _sections_in(part)]


def _section(section: type[Section]) -> str:
    bases = [each for each in reversed(section.__mro__) if issubclass(each, Section)]
    written = {name: field for each in bases for name, field in _written(each).items()}
    lines = [f"## {section.__name__}\n", f"{inspect.getdoc(section)}\n"]
    lines += ["| field | type | default | counts as | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, info in section.model_fields.items():
        annotation, meaning = written[name]
        cells = (f"`{name}`", _type(annotation), _default(info), _counts(mark_of(section, name)), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _written(section: type[Section]) -> dict[str, tuple[ast.expr, str]]:
    """(annotation, docstring) of each field, as they stand in the source."""
    [body] = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, tuple[ast.expr, str]] = {}
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = (statement.annotation, _text(after))
    return found


def _text(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value))
    return ""


def _type(annotation: ast.expr) -> str:
    text = ast.unparse(_without_marks(annotation))
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " | ").replace("'", ""), text)
    names = "|".join(sorted((each.__name__ for each in set(_sections(Config))), key=len, reverse=True))
    pieces = re.split(rf"\b({names})\b", text)
    return "".join(
        f"[`{piece}`](#{piece.lower()})" if index % 2 else (f"`{piece.strip()}`" if piece.strip() else "")
        for index, piece in enumerate(pieces)
    )


def _without_marks(annotation: ast.expr) -> ast.expr:
    class Strip(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            name = node.value.id if isinstance(node.value, ast.Name) else ""
            if name in ("Result", "Operation"):
                return self.visit(node.slice)
            if name == "Annotated" and isinstance(node.slice, ast.Tuple):
                return self.visit(node.slice.elts[0])
            return self.generic_visit(node)

    return Strip().visit(annotation)


def _default(info: Any) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is PydanticUndefined:
        return ""
    if isinstance(value, Section):
        own = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_yaml(own)}`" if own else "its own"
    if isinstance(value, list) and value and isinstance(value[0], Section):
        value = [each.model_dump(mode="json", exclude_defaults=True) for each in value]
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("\n...").strip()


def _counts(mark: Mark) -> str:
    if not mark.decides:
        return "operation"
    return "result" + (f", but for {', '.join(f'`{each}`' for each in sorted(mark.but_not))}" if mark.but_not else "")


def _types() -> Iterator[str]:
    """The names in the tables above that stand for a range of values."""
    body = [each for module in (base, ranges) for each in ast.parse(inspect.getsource(module)).body]
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name, value = statement.targets[0].id, statement.value
            if name[0].isupper() and not name.isupper() and isinstance(value, ast.Subscript):
                text = ast.unparse(value).replace("|", "\\|")
                meaning = _text(after).replace("\n", " ")
                yield f"| `{name}` | `{text}` {meaning} |\n"
