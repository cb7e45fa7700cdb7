"""`vllm.LLM` in a separate process: for each line on standard input it answers all prompts and prints the seconds.

    python jobs/benchmarks/_llm_peer.py JOB.json

JOB: {arguments of `vllm.LLM`, sampling, and as token ids `generate`: prompts, `score`: prompts to score}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    from vllm import LLM, SamplingParams

    from lorapar_ray.engines.settings import platform_arguments

    llm = LLM(**{**platform_arguments(), **job["arguments"]})
    work = {
        "generate": (job["generate"], SamplingParams(**job["sampling"])),
        "score": (job["score"], SamplingParams(max_tokens=1, prompt_logprobs=0)),
    }
    print("ready", flush=True)
    for line in sys.stdin:
        prompts, sampling = work[line.strip()]
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
