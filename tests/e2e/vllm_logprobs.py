"""Stock vLLM with a stock LoRA request: log-probabilities of given tokens, as JSON on the last line.

python vllm_logprobs.py MODEL ADAPTER TOKENS_JSON
"""

import json
import os
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True, enable_lora=True, max_lora_rank=8)
    lora = LoRARequest("adapter", 1, adapter)
    prompt = {"prompt_token_ids": tokens}
    output = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=lora)[0]
    pairs = list(zip(output.prompt_logprobs, tokens, strict=True))[1:]
    llm.llm_engine.engine_core.shutdown()  # its process would outlive this one and hold the output open
    print(json.dumps([entry[token].logprob for entry, token in pairs]), flush=True)
    os._exit(0)  # the CPU engine's threads may abort an orderly exit; the answer is out
