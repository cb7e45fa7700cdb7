"""vLLM's own serving of the OpenAI protocol, on an engine of ours."""

from __future__ import annotations

import uuid
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

BASE = "base"
PLAIN = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
"""The template of a model without one: as such a model was trained, see `datasets.chat`."""


async def openai_state(engine: Any, path: str, adapters: Mapping[str, str]) -> Any:
    """vLLM's own serving of chats and completions, on an engine that runs."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", path])
    # where there are adapters the base is one of them (`neutral`), and nobody can name the bare one
    arguments.served_model_name = [uuid.uuid4().hex if adapters else BASE]
    arguments.lora_modules = [LoRAModulePath(name=name, path=folder) for name, folder in adapters.items()] or None
    arguments.disable_log_stats = True
    if engine.get_tokenizer().chat_template is None:
        arguments.chat_template = PLAIN
    state = State()
    await init_app_state(engine, state, arguments, ("generate",))
    return state
