"""What an import leaves out is not needed, and what it puts off happens later."""

import importlib
import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.heavy_imports import _compiled_when_called, import_when_used, is_ray_worker, without_module
from lorapar_ray.models import resolve_model
from tests.tiny_run import ROOT

QUESTION = "What is 2 + 3, naïvely?"
WITHOUT_TORCH = """
import json, sys
from lorapar_ray.datasets.chat import load_encoder
from lorapar_ray.heavy_imports import leave_out_torch
leave_out_torch()
encoder = load_encoder(sys.argv[1], None)
print(json.dumps([encoder.prompt_ids(sys.argv[2]), encoder.end_ids, "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_a_tokenizer_without_torch_gives_the_same_tokens() -> None:
    model = resolve_model("package:smollm2-135m-instruct")
    command = [sys.executable, "-c", WITHOUT_TORCH, model, QUESTION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    encoder = load_encoder(model, None)
    assert json.loads(done.stdout) == [encoder.prompt_ids(QUESTION), encoder.end_ids, False]
    assert done.stderr == ""
    assert not is_ray_worker()  # in this process, where torch is wanted


def test_functions_are_compiled_once_and_only_when_called() -> None:
    compiled: list[dict[str, Any]] = []

    def compiler(function: Any, **how: Any) -> Any:
        compiled.append(how)
        return lambda value: function(value) + 100

    torch_compile = partial(_compiled_when_called, compiler)

    @torch_compile
    def plain(value: int) -> int:
        return value + 1

    @torch_compile(dynamic=False)
    def with_options(value: int) -> int:
        """Doubles."""
        return 2 * value

    assert compiled == [] and with_options.__doc__ == "Doubles."
    assert (plain(1), plain(2), with_options(3)) == (102, 103, 106)
    assert compiled == [{}, {"dynamic": False}]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a module; its module writes a file when it is imported."""
    folder = tmp_path / "put_off"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "part.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'imported')!r}).touch()\nSIX = 6\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("put_off", "put_off.part"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is as before after the test
        del sys.modules[name]
    return tmp_path


def test_a_module_is_imported_when_its_first_name_is_used(package: Path) -> None:
    import_when_used("put_off.part")
    part = importlib.import_module("put_off.part")
    assert find_spec("put_off.part") is not None and not hasattr(part, "__all__")
    assert not (package / "imported").exists()
    assert part.SIX == 6 and (package / "imported").exists()
    real = sys.modules["put_off.part"]
    assert real is not part and part.SIX is real.SIX
    with pytest.raises(AttributeError, match="SEVEN"):
        _ = part.SEVEN
    import_when_used("put_off.part")  # it has been imported
    import_when_used("put_off.missing")
    import_when_used("no_such_package.part")
    assert sys.modules["put_off.part"] is real
    assert not {"put_off.missing", "no_such_package.part"} & set(sys.modules)


def test_a_module_is_left_out_only_within_the_block(package: Path) -> None:
    with without_module("put_off.part"), pytest.raises(ImportError, match="is left out here"):
        importlib.import_module("put_off.part")
    assert importlib.import_module("put_off.part").SIX == 6
    with without_module("put_off.part"):
        assert importlib.import_module("put_off.part").SIX == 6
