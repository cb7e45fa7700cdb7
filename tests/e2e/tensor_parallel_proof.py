"""Serves policies on an engine of tensor-parallel ranks, the last of which then stays behind; prints what it found.

python -m tests.e2e.tensor_parallel_proof STUDENT FAULT MAX_LORA_RANK RANKS DTYPE

The engine merges policies if MAX_LORA_RANK is 0; else it is sent an adapter with other names, too. FAULT is a file:
while it exists, the last rank does not do what it is told.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import LLM

from lorapar_ray.adapters import adapter_parameters, save_adapter
from lorapar_ray.engines.mismatch import PolicyMismatch
from lorapar_ray.engines.policy_loader import PolicyLoader, read_adapter
from lorapar_ray.engines.proof import PolicyProof, proof_arguments
from tests.e2e.faulty_engine import rename

FAULT = "LORAPAR_TEST_FAULT"
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LateRank(PolicyLoader):
    """With the fault, the last rank says that it loads a policy and does not, or leaves an adapter's slot empty."""

    rank: int
    vllm_config: Any

    def late(self) -> bool:
        return self.rank == self.vllm_config.parallel_config.world_size - 1 and Path(os.environ[FAULT]).exists()

    def lorapar_load_policy(self, adapter: str | None) -> str:
        if not self.late():
            return super().lorapar_load_policy(adapter)
        assert adapter is not None
        return read_adapter(Path(adapter), self.device)[2]

    def lorapar_check_adapter(self, lora_id: int, adapter: str) -> tuple[str, str]:
        if self.late():
            for layer in self.model_runner.lora_manager._adapter_manager.modules.values():
                layer.reset_lora(self.model_runner.lora_manager._adapter_manager.lora_index_to_id.index(lora_id))
        return super().lorapar_check_adapter(lora_id, adapter)


@torch.no_grad()
def main(student: str, max_lora_rank: int, ranks: int, dtype: str) -> dict[str, list[Any]]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(student, dtype=getattr(torch, dtype))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=EVERY_LINEAR))
    several = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"} if ranks > 1 else {}
    extension = f"tests.e2e.tensor_parallel_proof.{LateRank.__name__}"
    eager = not torch.cuda.is_available()
    engine = {"dtype": dtype, "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": eager, **several}
    arguments = proof_arguments(max_lora_rank or None, worker_extension_cls=extension, **engine)
    proof = PolicyProof(LLM(student, **arguments), [list(range(5, 45))])
    gaps, refused = [], []
    for fault in (False, False, True, False):
        for parameter in adapter_parameters(model).values():
            parameter += 0.02 * torch.randn(parameter.shape)
        Path(os.environ[FAULT]).touch() if fault else Path(os.environ[FAULT]).unlink(missing_ok=True)
        try:
            gaps.append(proof.serve(model).gap)
        except PolicyMismatch as error:
            refused.append(str(error))
    found = {"gaps": gaps, "refused": refused}
    if max_lora_rank:
        with TemporaryDirectory() as folder:
            save_adapter(model, wrapped := Path(folder) / "adapter")
            rename(wrapped, lambda _: True)
            try:
                proof.serve(wrapped)
            except PolicyMismatch as error:
                found["names"] = [str(error)]
    proof.close()
    return found


if __name__ == "__main__":
    os.environ[FAULT] = sys.argv[2]
    print(json.dumps(main(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])), flush=True)
    os._exit(0)
