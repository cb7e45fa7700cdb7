"""vLLM's implementation of the OpenAI protocol, on our engine."""

from __future__ import annotations

import uuid
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

BASE = "base"
PLAIN = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
"""For a model without a chat template: the format that it was trained with, see `datasets.chat`."""


async def openai_state(engine: Any, path: str, adapters: Mapping[str, str]) -> Any:
    """vLLM's handlers of chats and completions, on a running engine."""
    from starlette.datastructures import State
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", path])
    # with adapters, the base is one of them (`neutral`), so clients cannot name the base without an adapter
    arguments.served_model_name = [uuid.uuid4().hex if adapters else BASE]
    arguments.lora_modules = [LoRAModulePath(name=name, path=folder) for name, folder in adapters.items()] or None
    arguments.disable_log_stats = True
    if engine.get_tokenizer().chat_template is None:
        arguments.chat_template = PLAIN
    state = State()
    await init_app_state(engine, state, arguments, ("generate",))
    return state
