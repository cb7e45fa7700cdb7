"""lm-eval on our engines: its tasks, prompts, filters and metrics, our model class, our sandbox for code.

lm-eval is an optional package (extra `eval`): nothing outside this folder imports it, and nothing in here fetches data
or starts anything when it is imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from lorapar_ray.errors import UserError


def require_lm_eval(what: str) -> None:
    """Check that lm-eval is installed.

    Args:
        what: the option or the field that needs it.

    Raises:
        UserError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise UserError(f"{what}: needs lm-eval; pip install 'lorapar-ray[eval]'")
