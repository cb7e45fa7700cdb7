"""A plan's estimate of GPU memory, compared with what autograd stores on a CPU, and which GPU it fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GraniteConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lorapar_ray.adapters import attach_lora
from lorapar_ray.cli import app
from lorapar_ray.config import AdapterConfig, Config, ModelConfig
from lorapar_ray.config_file import load_config
from lorapar_ray.engines.settings import WHOLE_GPU, memory_share
from lorapar_ray.errors import UserError
from lorapar_ray.gpu_memory import Device, Need, StudentSize, memory_lines, needs_of, student_size
from lorapar_ray.gpus import place
from lorapar_ray.grpo.memory import kept_bytes_per_token

GIB = 2**30
LLAMA = Path(__file__).parents[2] / "jobs/configs/gsm8k-llama2-7b.yaml"
SHARED = [
    "grpo.rollout_actors=1",
    "grpo.learners=1",
    "grpo.rollout_resources.gpus=auto",
    "grpo.learner_resources.gpus=auto",
]


def with_learners(count: int) -> list[str]:
    """`SHARED` with so many learners."""
    return [each.replace("grpo.learners=1", f"grpo.learners={count}") for each in SHARED]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of LLaMA2-7B, whose sizes are the class's defaults, without weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_gpu(llama: str) -> Config:
    return load_config(LLAMA, [f"model.path={llama}", *SHARED])


@pytest.fixture(scope="module")
def size(one_gpu: Config) -> StudentSize:
    return student_size(one_gpu.model, one_gpu.adapter)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_matches_what_autograd_stores(tmp_path: Path, dropout: float) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=128
    )
    config._attn_implementation = "sdpa"
    config.save_pretrained(tmp_path)
    adapter = AdapterConfig(rank=4, alpha=8, dropout=dropout)
    told = student_size(ModelConfig(path=str(tmp_path), dtype="float32"), adapter)
    model = attach_lora(LlamaForCausalLM(config), rank=4, alpha=8, dropout=dropout).train(dropout > 0)
    ids = torch.arange(64)[None]
    seen = kept_bytes_per_token(model, {"input_ids": ids, "position_ids": ids})
    assert (told.kept_with_dropout if dropout else told.kept) == pytest.approx(seen, rel=0.03)
    head = model.get_output_embeddings().weight
    assert told.outside == 4 * (2 * head.numel() + config.hidden_size)  # embeddings, head, last norm
    assert told.logit == 4
    assert told.base == sum(4 * value.numel() for key, value in model.named_parameters() if "lora_" not in key)
    assert told.elements == sum(value.numel() for key, value in model.named_parameters() if "lora_" in key)


def test_llama2_7b_engine_and_learner_share_one_gpu_of_80_gib(one_gpu: Config, size: StudentSize) -> None:
    engine, learner = needs_of(place(one_gpu, "grpo", 1), "grpo", size)
    assert (engine.share, learner.share) == (0.6, 0.4)
    assert 13.5e9 < learner.bytes < learner.most < learner.share * 80 * GIB
    assert 13.5e9 < engine.bytes < engine.share * 80 * GIB
    list(memory_lines(one_gpu, ["score", "sft", "grpo", "evaluate"], size, Device(1, 80 * GIB)))


def test_an_engine_has_room_for_every_policy_in_use(llama: str, size: StudentSize) -> None:
    def adapters(*changed: str) -> float | None:
        told = load_config(LLAMA, [f"model.path={llama}", *SHARED, *changed])
        return needs_of(place(told, "grpo", 1), "grpo", size)[0].parts.get("adapters")

    assert adapters() == 2 * 2 * size.elements  # in 16 bits: the policy and the one before
    assert adapters("grpo.max_staleness=3", "grpo.importance_cap=2") == 4 * 2 * size.elements
    assert adapters("grpo.sync=merged") is None


def test_what_cannot_fit_is_refused_after_the_estimate(one_gpu: Config, size: StudentSize) -> None:
    seen = []
    with pytest.raises(UserError, match=r"grpo: a learner takes at least 1\d\.\d GiB \(base 12\.6\) and has 12\.4 GiB"):
        seen.extend(memory_lines(one_gpu, ["grpo"], size, Device(1, 31 * GIB)))
    with pytest.raises(UserError, match=r"grpo: a rollout engine takes at least 16\.3 GiB.* and has 16\.2 GiB"):
        seen.extend(memory_lines(one_gpu, ["grpo"], size, Device(1, 30 * GIB)))
    with pytest.raises(
        UserError, match=r"score: a worker takes at least 1\d\.\d GiB \(base 12\.6\).*quantization: nf4"
    ):
        for line in memory_lines(one_gpu, ["score", "grpo"], size, Device(1, 12 * GIB)):
            seen.append(line)
    assert any("learner" in line for line in seen)


def refusal(config: Config, stage: str, size: StudentSize, memory: float) -> str | None:
    """What the plan says for one GPU of so many bytes; None: it fits."""
    try:
        list(memory_lines(config, [stage], size, Device(1, memory)))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("settings", "stage", "fills"),
    [
        (SHARED, "grpo", 0.9 * 0.6),
        ([], "evaluate", 0.92),
        (["evaluate.engine.extra={gpu_memory_utilization: 0.5}"], "evaluate", 0.5),
        (["evaluate.engine.extra={kv_cache_memory_bytes: 2000000000}"], "evaluate", 1.0),
    ],
)
def test_an_engine_has_to_fit_what_it_fills(
    llama: str, size: StudentSize, settings: list[str], stage: str, fills: float
) -> None:
    """The part that vLLM is told to fill, and not its whole share of the GPU."""
    config = load_config(LLAMA, [f"model.path={llama}", *settings])
    [engine, *_] = needs_of(place(config, stage, 1), stage, size)
    resources, own = (
        (place(config, stage, 1).grpo.rollout_resources, config.grpo.rollout_engine)
        if stage == "grpo"
        else (place(config, stage, 1).evaluate.resources, config.evaluate.engine)
    )
    told = {**memory_share(resources), **own.extra}
    assert engine.fills == pytest.approx(fills)
    assert "kv_cache_memory_bytes" in told or told["gpu_memory_utilization"] == engine.fills
    least = engine.bytes / fills
    few = f"{'a rollout' if stage == 'grpo' else 'an'} engine takes at least {engine.bytes / GIB:.1f} GiB"
    assert few in str(refusal(config, stage, size, 0.99 * least))
    if stage == "evaluate":
        assert refusal(config, stage, size, 1.01 * least) is None
        if "kv_cache_memory_bytes" in told:
            assert engine.parts["cache"] == 2e9


def test_an_engine_that_fills_more_than_its_share_is_refused(llama: str, size: StudentSize) -> None:
    more = load_config(
        LLAMA, [f"model.path={llama}", *SHARED, "grpo.rollout_engine.extra={gpu_memory_utilization: 0.85}"]
    )
    told = refusal(more, "grpo", size, 80 * GIB)
    assert told == (
        "grpo: a rollout engine has 0.6 of a GPU and its extra.gpu_memory_utilization fills 0.85 of it, which others "
        "need; remove that setting, or give the engine a whole GPU"
    )
    alone = load_config(LLAMA, [f"model.path={llama}", "grpo.rollout_engine.extra={gpu_memory_utilization: 0.85}"])
    list(memory_lines(alone, ["grpo"], size, Device(4, 80 * GIB)))


def test_the_default_of_a_whole_gpu_is_vllms() -> None:
    from vllm.config import CacheConfig

    assert CacheConfig.gpu_memory_utilization == WHOLE_GPU


def test_scoring_that_warms_up_needs_what_stage_1_does_too(llama: str, size: StudentSize) -> None:
    """The warm-up trains every element in the scoring workers, by stage 1's micro-batch."""
    settings = [f"model.path={llama}", "adapter.init=default", "sft.micro_batch_size=16", "score.workers=3"]
    config = place(load_config(LLAMA, [*settings, "sft.gradient_checkpointing=false"]), "score", 8)
    warm_up, worker = needs_of(config, "score", size)
    assert (warm_up.process, warm_up.count, worker.process) == ("warm-up worker", 3, "worker")
    [stage1] = needs_of(place(config, "sft", 8), "sft", size)
    assert warm_up.most == pytest.approx(stage1.most - 4 * size.elements)  # no positions of active elements
    assert warm_up.parts["moments"] == 8 * size.elements
    assert warm_up.most > worker.most
    line = next(memory_lines(config, ["score"], size, Device(8, 40 * GIB)))
    assert line.startswith("score      3 × warm-up worker") and "if that does not fit" in line
    without = load_config(LLAMA, [*settings, "adapter.warmup_steps=0"])
    assert [each.process for each in needs_of(place(without, "score", 8), "score", size)] == ["worker"]


def test_what_only_the_longest_rows_need_is_no_reason_to_refuse(llama: str, one_gpu: Config, size: StudentSize) -> None:
    [score] = memory_lines(one_gpu, ["score"], size, Device(1, 40 * GIB))
    assert "in the fullest pass up to 45.7: activations 31.5, logits 0.5" in score
    assert "if that does not fit, lower the tokens of a pass (score.batch_tokens" in score
    long = load_config(LLAMA, [f"model.path={llama}", "sft.max_length=8192", "sft.micro_batch_size=16"])
    [sft] = memory_lines(long, ["sft"], size, Device(2, 40 * GIB))
    assert "at least 12.7 GiB" in sft and "if that does not fit" in sft
    [fits] = memory_lines(one_gpu, ["score"], size, Device(1, 80 * GIB))
    assert "if that does not fit" not in fits


def of_sft(llama: str, size: StudentSize, *settings: str) -> Need:
    plain = [f"model.path={llama}", "sft.gradient_checkpointing=false"]
    changed = load_config(LLAMA, [each for each in plain if each.split("=")[0] not in str(settings)] + list(settings))
    [need] = needs_of(place(changed, "sft", 8), "sft", size)
    return need


def test_a_cut_base_is_gathered_outside_of_its_layers_for_a_whole_pass(llama: str, size: StudentSize) -> None:
    cut = of_sft(llama, size, "sft.sharding=fsdp2", "sft.workers=4")
    assert size.outside == 2 * (2 * 32000 * 4096 + 4096)
    assert cut.parts["base"] == size.base / 4 + size.outside + 2 * size.largest_layer


def test_graphs_of_stage_1_store_the_activations_twice(llama: str, size: StudentSize) -> None:
    graphs, eager = (of_sft(llama, size, f"sft.acceleration={how}") for how in ("graphs", "none"))
    assert eager.more["activations"] > GIB
    assert graphs.more["CUDA graphs"] >= eager.more["activations"] + eager.more["logits"]
    assert graphs.bytes == eager.bytes  # where they are too much they are dropped
    for setting in ("sft.gradient_checkpointing=true", "sft.sharding=fsdp2", "model.quantization=nf4"):
        assert "CUDA graphs" not in of_sft(llama, size, setting).more


def test_moments_are_certain_only_where_every_element_trains(llama: str, size: StudentSize) -> None:
    masked, whole = (of_sft(llama, size, f"sft.masked={each}") for each in ("true", "false"))
    assert whole.bytes == masked.bytes + 8 * size.elements
    assert "moments" in masked.more and "moments" not in whole.more


@pytest.mark.parametrize(("family", "stored"), [(LlamaConfig, False), (GraniteConfig, True)])
def test_scoring_stores_logits_only_of_a_model_that_changes_them_after_its_head(
    tmp_path: Path, one_gpu: Config, family: Any, stored: bool
) -> None:
    config = family(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=256_000
    )
    config.save_pretrained(tmp_path)
    told = student_size(ModelConfig(path=str(tmp_path), dtype="bfloat16"), AdapterConfig(rank=4, alpha=8))
    assert told.ends_with_head != stored
    [need] = needs_of(place(one_gpu, "score", 1), "score", told)
    assert (need.more["logits"] > 2 * 2 * 256_000 * 4096) == stored


@pytest.mark.parametrize("why", ["plain head", "the config says what follows", "something follows"])
def test_stage_2_stores_logits_only_behind_a_head_that_it_cannot_compute(
    tmp_path: Path, one_gpu: Config, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = GraniteConfig if why == "the config says what follows" else LlamaConfig
    config = family(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=256_000
    )
    config.save_pretrained(tmp_path)
    if why == "something follows":
        forward = LlamaForCausalLM.forward

        def doubled(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            output.logits = output.logits * 2
            return output

        monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    told = student_size(ModelConfig(path=str(tmp_path), dtype="bfloat16"), AdapterConfig(rank=4, alpha=8))
    learner = next(each for each in needs_of(place(one_gpu, "grpo", 1), "grpo", told) if each.process == "learner")
    grpo = one_gpu.grpo
    tokens = grpo.max_prompt_length + grpo.max_completion_length
    stored = why == "something follows"
    assert learner.more["logits"] - 2 * 4 * 2**26 == (2 * 2 * 256_000 * tokens if stored else 0)


SMALLER: list[tuple[str, str, Callable[[Any], float]]] = [
    ("model.quantization=nf4", "grpo", lambda needs: needs[1].parts["base"]),
    ("score.gradient_checkpointing=true", "score", lambda needs: needs[0].more["activations"]),
    ("score.batch_tokens=1024", "score", lambda needs: needs[0].more["activations"]),
    ("adapter.rank=4", "sft", lambda needs: needs[0].most - needs[0].more["activations"]),
    ("evaluate.engine.enforce_eager=true", "evaluate", lambda needs: needs[0].bytes),
]


@pytest.mark.parametrize(("setting", "stage", "part"), SMALLER)
def test_the_advised_settings_take_less(
    llama: str, one_gpu: Config, size: StudentSize, setting: str, stage: str, part: Callable[[Any], float]
) -> None:
    changed = load_config(LLAMA, [f"model.path={llama}", *SHARED, setting])
    other = student_size(changed.model, changed.adapter) if setting.startswith(("model", "adapter")) else size
    before = needs_of(place(one_gpu, stage, 1), stage, size)
    after = needs_of(place(changed, stage, 1), stage, other)
    assert part(after) < part(before) - GIB / 10


def test_learners_that_share_a_sequence_each_need_its_part_of_the_activations(
    llama: str, one_gpu: Config, size: StudentSize
) -> None:
    shared = load_config(LLAMA, [f"model.path={llama}", *with_learners(4), "grpo.sequence_parallel=4"])
    [whole, part] = [needs_of(place(each, "grpo", 8), "grpo", size)[1] for each in (one_gpu, shared)]
    assert (whole.count, part.count) == (1, 4)
    assert part.more["activations"] == pytest.approx(whole.more["activations"] / 4, rel=0.01)
    assert part.parts["base"] == whole.parts["base"]


@pytest.mark.slow
def test_a_plan_shows_it_where_there_are_gpus_and_ends_with_what_cannot_fit(llama: str, tmp_path: Path) -> None:
    def told(*settings: str, learners: int = 1) -> Any:
        tree = yaml.safe_load(LLAMA.read_text())
        tree["data"] = {name: [{"reader": "file", "path": str(rows)}] for name in ("train", "test")}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        options = [
            word for each in (f"model.path={llama}", *with_learners(learners), *settings) for word in ("--set", each)
        ]
        command = ["run", str(tmp_path / "c.yaml"), "--dry-run", "--run-dir", str(tmp_path / "run"), *options]
        return CliRunner().invoke(app, command)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert "GPU memory" not in told("cluster.max_gpus=0").output
    fits = told("cluster.max_gpus=8", "cluster.gpu_memory_gib=80")
    assert fits.exit_code == 0, fits.output
    assert "1 × learner: at least 12.8 GiB" in " ".join(fits.output.split())
    uneven = told("cluster.max_gpus=0", "grpo.sequence_parallel=3", learners=3)
    assert "3 learners cannot divide the model's 32 attention heads; set one of 1, 2, 4," in str(uneven.exception)
    refused = told("cluster.max_gpus=1", "cluster.gpu_memory_gib=12")
    assert refused.exit_code != 0
    assert "score: a worker takes at least" in str(refused.exception)
