"""How engines load a policy and verify that they serve it; the part inside vLLM is tested in tests/e2e."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.adapters import adapter_state, attach_lora, merged_weights
from lorapar_ray.engines.base_weights import KeptWeights, require_host_memory
from lorapar_ray.engines.mismatch import PolicyMismatch, agreed, verified
from lorapar_ray.engines.settings import GRAPHS, OUTSIDE_TORCH, cache_room
from lorapar_ray.engines.weight_loading import bit_sums, load_in_place
from lorapar_ray.mergeable import not_in_the_files, unmergeable
from tests.unit.tiny_models import tiny

TOKENS = torch.arange(5, 37).unsqueeze(0)


def test_policies_merged_in_float32_lie_within_1e_6_nats_where_the_files_are_bfloat16() -> None:
    files = {name: value.bfloat16() for name, value in tiny().state_dict().items()}
    wide = {name: value.float() for name, value in files.items()}
    base = tiny()
    base.load_state_dict(wide)
    model = attach_lora(base, rank=4, alpha=8, init="gaussian", init_std=0.05)
    state = {key: value.detach().clone() for key, value in adapter_state(model).items()}

    def gap(dtype: torch.dtype) -> float:
        served = tiny()
        merged = {name: value.float() for name, value in merged_weights(files, state, scaling=2.0, dtype=dtype)}
        served.load_state_dict({**wide, **merged})
        with torch.no_grad():
            ours, theirs = (each(TOKENS).logits.log_softmax(-1) for each in (model, served))
        return float((ours - theirs).abs().mean())

    assert gap(torch.float32) < 1e-6
    assert gap(torch.bfloat16) > 1e-4  # the gap from rounding to the file's dtype


class Files(Mapping[str, Tensor]):
    """A checkpoint that counts how often it is read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_a_kept_base_reads_each_file_once() -> None:
    files = Files({"a": torch.ones(2), "b": torch.zeros(2)})
    kept = KeptWeights(files, torch.device("cpu"), resident=True)
    for _ in range(3):
        assert torch.equal(kept["a"], files.tensors["a"])
    assert files.reads == 1
    assert set(kept) == {"a", "b"}


def test_copies_of_the_base_that_the_host_cannot_hold_are_refused() -> None:
    """Each tensor-parallel rank pins whole tensors."""
    gib = 2**30
    require_host_memory(130 * gib, 1, 200 * gib)
    with pytest.raises(ValueError, match=r"130\.0 GiB for each of 8 ranks, and 900\.0 .*grpo\.sync: adapter"):
        require_host_memory(130 * gib, 8, 900 * gib)


class Loads(torch.nn.Module):
    """Loads weights like a vLLM model: two checkpoint tensors lie in one; the real one is tested in tests/e2e."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.both = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16), requires_grad=False)
        self.forgets = forgets

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in weights:
            if not (self.forgets and name == "b"):
                self.both.data[{"a": slice(0, 2), "b": slice(2, 4)}[name]].copy_(tensor)
        return {"both"}


def test_weights_loaded_in_place_are_compared_with_what_was_sent() -> None:
    sent = {name: torch.randn(2, 3, dtype=torch.bfloat16) for name in "ab"}
    model = Loads()
    storage = model.both.data_ptr()
    load_in_place(model, iter(sent.items()), whole=True)
    assert torch.equal(model.both, torch.cat([sent["a"], sent["b"]]))
    assert model.both.data_ptr() == storage  # CUDA graphs captured it
    with pytest.raises(ValueError, match="not those of the policy"):
        load_in_place(Loads(forgets=True), iter(sent.items()), whole=True)


def test_sums_of_bits_add_up_and_detect_a_flipped_bit() -> None:
    whole = torch.randn(6, 5)
    assert torch.equal(bit_sums(whole), bit_sums(whole[:2]) + bit_sums(whole[2:]))
    other = whole.clone()
    other.view(torch.int32)[0, 0] ^= 1
    assert not torch.equal(bit_sums(whole), bit_sums(other))


def test_ranks_that_loaded_different_policies_are_found() -> None:
    assert agreed(["abc", "abc"]) == "abc"
    with pytest.raises(PolicyMismatch, match="ranks loaded different policies: abc, abd"):
        agreed(["abc", "abd"])
    assert verified(["abc"], [("abc", ""), ("abc", "")]) == "abc"
    with pytest.raises(PolicyMismatch, match="ranks loaded different policies: abc, abc, abd"):
        verified(["abc"], [("abc", ""), ("abd", "")])
    with pytest.raises(PolicyMismatch, match="on its rank 1, 2 of 7 modules"):
        verified(["abc"], [("abc", ""), ("abc", "2 of 7 modules compute with other weights")])


def test_modules_with_other_names_in_the_files_are_refused_in_one_line(tmp_path: Path) -> None:
    save_file({"language_model.model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    keys = [f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight" for part in "AB"]
    missing = unmergeable(str(tmp_path), keys)
    assert missing == ["model.layers.0.mlp.up_proj.weight"]
    line = not_in_the_files(missing, "wrapped")
    assert "'wrapped', which do not hold 'model.layers.0.mlp.up_proj.weight' under" in line
    assert "set grpo.sync: adapter" in line and "\n" not in line
    wrapped = [key.replace(".model.layers", ".language_model.model.layers") for key in keys]
    assert unmergeable(str(tmp_path), wrapped) == []
    assert unmergeable("owner/on-the-hub", keys) == []


def test_an_engine_on_a_part_of_a_gpu_sizes_its_cache_by_its_own_use() -> None:
    part, peak = 20 * 2**30, 5 * 2**30
    assert cache_room(part, peak, graphs=False) == part - peak - OUTSIDE_TORCH
    assert cache_room(part, peak, graphs=True) == part - peak - OUTSIDE_TORCH - GRAPHS
    with pytest.raises(ValueError, match=r"needs 21\.0 GiB besides its cache and has 20\.0 GiB"):
        cache_room(part, part, graphs=False)
