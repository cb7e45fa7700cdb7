"""Stock vLLM with stock LoRA requests: log-probabilities of given tokens under each adapter, as JSON on the last line.

python vllm_logprobs.py MODEL TOKENS_JSON ADAPTER ...
"""

import json
import os
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, tokens, adapters = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    llm = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True, enable_lora=True, max_lora_rank=8)
    logprobs = []
    for number, adapter in enumerate(adapters, start=1):
        lora = LoRARequest(f"adapter-{number}", number, adapter)
        prompt = {"prompt_token_ids": tokens}
        output = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=lora)[0]
        pairs = list(zip(output.prompt_logprobs, tokens, strict=True))[1:]
        logprobs.append([entry[token].logprob for entry, token in pairs])
    llm.llm_engine.engine_core.shutdown()  # its process would outlive this one and hold the output open
    print(json.dumps(logprobs), flush=True)
    os._exit(0)  # the CPU engine's threads may abort a normal exit; the answer is already written
