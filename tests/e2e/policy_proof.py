"""Runs the page docs/policy-proof.md on a tiny student, with faults in between; prints what it found as JSON. Before
that it loads a policy in place, without an engine.

python -m tests.e2e.policy_proof STUDENT FOLDER
"""

import json
import os
import re
import sys
from copy import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from lorapar_ray.adapters import adapter_parameters, save_adapter
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.proof import PolicyProof
from tests.e2e.vllm_in_place import loaded_in_place
from tests.tiny_run import ROOT

PAGE = ROOT / "docs" / "policy-proof.md"


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def refused(proof: PolicyProof, policy: Any) -> str:
    try:
        proof.serve(policy)
    except PolicyMismatch as error:
        return str(error)
    return ""


@torch.no_grad()
def move(model: Any, size: float) -> None:
    for parameter in adapter_parameters(model).values():
        parameter += size * torch.randn(parameter.shape)


def main(student: str, folder: Path) -> dict[str, Any]:
    blocks = re.findall(r"```python title=.*?\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"reward": reward, "dataset": Dataset.from_dict({"prompt": ["What is 5 + 2?"] * 8})}
    exec(blocks[0].replace("path/to/model", student), names)
    proof, model = names["proof"], names["model"]
    found: dict[str, Any] = {"answer": len(names["answers"][0].outputs[0].token_ids)}

    move(model, 0.1)
    found["gap"] = proof.serve(model).gap
    load = proof._load
    proof._load = lambda folder, number: [proof._digest]  # nothing is loaded
    move(model, 0.1)
    found["a lost step of 0.1"] = refused(proof, model)  # the digest of the previous one
    proof._load = load
    proof.serve(model)
    proof._load = lambda folder, number: []
    move(model, 1e-7)
    found["a lost step of 1e-7"] = refused(proof, model)
    proof._load = load
    found["after it"] = refused(proof, model)
    save_adapter(model, folder / "adapter")
    found["a directory"] = refused(proof, folder / "adapter")
    move(model, 0.1)
    try:
        proof.check(model)
    except PolicyMismatch as error:
        found["the trainer moved on"] = str(error)
    late = PolicyProof(proof.llm, proof._tokens)
    late.serve(folder / "adapter")
    try:
        late.check(model)
    except PolicyMismatch as error:
        found["a model that came after the first policy"] = str(error)
    late.close()

    arguments = (
        f"output_dir={str(folder)!r}, max_steps=3, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,"
    )
    exec(blocks[1].replace('output_dir="out",', arguments), names)
    proofs, log = names["callback"].proofs, names["trainer"].state.log_history
    found |= {
        "TRL: digests": len({each.digest for each in proofs}),
        "TRL: gap": max(each.gap for each in proofs),
        "TRL: logged": [each["policy_gap"] for each in log if "reward" in each],
    }
    trainer = names["trainer"]
    chat = copy(trainer)
    chat.chat_template = "{{ messages[0].content }}{{ kind }}{{ tools[0].function.name }}"
    chat.chat_template_kwargs, chat.tools = {"kind": " 7 "}, [{"type": "function", "function": {"name": "add"}}]
    chat.args = copy(trainer.args)
    chat.args.generation_kwargs = {"max_tokens": 3, "ignore_eos": True}
    sampled = names["callback"].rollout([[{"role": "user", "content": "5 +"}]], chat)
    found["TRL: a chat"] = trainer.processing_class.decode(sampled["prompt_ids"][0])
    found["TRL: tokens"] = len(sampled["completion_ids"][0])
    proof._load = lambda folder, number: []
    try:
        trainer.train()
    except PolicyMismatch as error:
        found["TRL: a lost step"] = str(error)
    proof.close()
    return found


def in_a_fork(student: Path, folder: Path) -> dict[str, Any]:
    """`loaded_in_place`, in a process that need not import vLLM again; this one then begins without its group."""
    file = folder / "in_place.json"
    if not (child := os.fork()):
        file.write_text(json.dumps(loaded_in_place(student, folder / "meet")))
        os._exit(0)
    os.waitpid(child, 0)
    return dict(json.loads(file.read_text()))


if __name__ == "__main__":
    place = in_a_fork(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps({"in place": place, **main(sys.argv[1], Path(sys.argv[2]))}), flush=True)
    os._exit(0)
