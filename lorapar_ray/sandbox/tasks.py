"""Jobs from rows of HumanEval and MBPP and a model's completions."""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lorapar_ray.errors import UserError
from lorapar_ray.sandbox.examination import Job

_FENCE = re.compile(r"```[ \t]*+(?:python3?|py)?+[ \t]*+\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
"""Possessive quantifiers: endless spaces in a completion must not take quadratic time."""


def code_of(completion: str) -> str:
    """The program in a completion: its last fenced block (even if not closed), else the whole completion."""
    blocks = _FENCE.findall(completion)
    return blocks[-1] if blocks else completion


def humaneval_job(row: Mapping[str, Any], completion: str) -> Job:
    """A row of HumanEval: {prompt, entry_point, test}; the completion continues the prompt.

    A completion in a fenced block that defines the function is used alone. The prompt's helper functions, which
    some tests call, are taken from the prompt for the tests, not from the program.

    Raises:
        UserError: the row lacks a field.
    """
    _require(row, "HumanEval", "prompt", "entry_point", "test")
    prompt, name = row["prompt"], row["entry_point"]
    code = code_of(completion)
    whole = code is not completion and re.search(rf"^(async )?def {re.escape(name)}\b", code, re.MULTILINE)
    # the prompt ends in a docstring, which is a function body, so the prompt is a program
    return Job(code if whole else prompt + code, f"{row['test']}\ncheck({name})\n", (name,), setup=prompt)


def mbpp_job(row: Mapping[str, Any], completion: str) -> Job:
    """A row of MBPP: {test_list}, and test_imports or test_setup_code.

    Raises:
        UserError: the row lacks a field, or its tests call no function.
    """
    _require(row, "MBPP", "test_list")
    setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code") or ""])
    return tests_job(code_of(completion), "\n".join(row["test_list"]), setup)


def tests_job(code: str, tests: str, setup: str = "") -> Job:
    """A job; its tested functions are found in its tests (see `called_names`).

    Modules of the standard library that the tests use without importing them are imported for them: MBPP's canonical
        tests rely on the program's imports, which the tests cannot see here.

    Raises:
        UserError: the tests are not a Python program, or call no function.
    """
    names = called_names(tests, setup)
    defined = {name for text in (setup, tests) for node in ast.walk(ast.parse(text)) for name in _defines(node)}
    owners = (node.value for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Attribute))
    used = {owner.id for owner in owners if isinstance(owner, ast.Name)} - defined - set(names)
    imports = "".join(f"import {name}\n" for name in sorted(used & sys.stdlib_module_names))
    return Job(code, tests, names, imports + setup)


def called_names(tests: str, setup: str = "") -> tuple[str, ...]:
    """The names that the tests call and that are not defined in the tests, the setup or Python.

    The program has no influence: if it defines `set` or `sorted`, the tests still call Python's. If every name is
    Python's, the first called one is used (MBPP has a task to write `sum`).

    Raises:
        UserError: the tests are not a Python program, or call no function.
    """
    try:
        trees = [ast.parse(setup), ast.parse(tests)]
    except (SyntaxError, ValueError) as error:
        raise UserError(f"tests: not a Python program ({error})") from error
    nodes = [node for tree in trees for node in ast.walk(tree)]
    defined = {name for node in nodes for name in _defines(node)}
    called = [
        node.func.id
        for node in sorted(
            (node for node in ast.walk(trees[1]) if isinstance(node, ast.Call)),
            key=lambda node: (node.lineno, node.col_offset),
        )
        if isinstance(node.func, ast.Name)
    ]
    foreign = dict.fromkeys(name for name in called if name not in defined and not hasattr(builtins, name))
    if not foreign and not called:
        raise UserError("tests: they call no function; write asserts that call the program's functions")
    return tuple(foreign) or (called[0],)


def _defines(node: ast.AST) -> Sequence[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return (node.id,)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return (node.name,)
    if isinstance(node, ast.arg):
        return (node.arg,)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    return ()


def _require(row: Mapping[str, Any], what: str, *fields: str) -> None:
    missing = [field for field in fields if not row.get(field)]
    if missing:
        raise UserError(f"{what}: a row has no '{missing[0]}'; it has {', '.join(map(str, row)) or 'nothing'}")
