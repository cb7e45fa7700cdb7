"""An example: a policy that may use a calculator, several times, while it answers.

It writes `<calc>12 * 7</calc>`, and the environment appends ` = 84`; then the policy continues. Set `grpo.environment:
lorapar_ray.grpo.environments.calculator:rollout`, and describe the calculator to the policy in `data.instruction`.
Rewards judge the text after the last call.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from lorapar_ray.grpo.environments import Trajectory, TurnEngine

BEGIN, END = "<calc>", "</calc>"
CALLS = 8
LONGEST = 60
"""Maximum characters of an expression, so that it is computed quickly."""
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


async def rollout(engine: TurnEngine, row: dict[str, Any]) -> Trajectory:
    """Let the policy answer, and evaluate its calculator calls."""
    trajectory = engine.begin(row["prompt_ids"])
    for _ in range(CALLS):
        turn = await engine.generate(trajectory, stop=[END])
        _, _, asked = engine.decode(turn.token_ids).rpartition(BEGIN)
        if not asked.endswith(END):
            break
        trajectory.add(engine.encode(f" = {calculate(asked.removesuffix(END))}\n"))
        if not trajectory.room:
            break
    return trajectory


def calculate(expression: str) -> str:
    """The exact value of a sum of products of numbers; "error" for anything else."""
    try:
        if len(expression) > LONGEST:
            raise ValueError("too long")
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no sum of products")
