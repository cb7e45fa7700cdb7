"""An `EngineActor` that answers requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lorapar_ray.cpu.engine import SCORED_FROM
from lorapar_ray.engines.actor import EngineActor
from lorapar_ray.engines.requests import Answer, answer_table


class AnsweringEngine(EngineActor):
    """Each call names its policy: an engine that joins, or replaces a lost one, has none yet."""

    def __init__(self, arguments: dict[str, Any], sync: str, where: str = "engine") -> None:
        super().__init__(arguments, sync, where)
        self._turn = asyncio.Lock()

    async def serve(self, digest: str, policy: Sequence[Any]) -> None:
        """Start the engine if needed, and load the policy with this digest.

        Args:
            policy: a reference to it, fetched only if needed; empty for the base.

        Raises:
            RuntimeError: the engine loaded another policy.
        """
        async with self._turn:
            await self.start()
            if self._served[0].digest != digest:
                loaded = await self.load_policy(await policy[0] if policy else None)
                if loaded != digest:
                    raise RuntimeError(f"the engine loaded another adapter: {loaded[:9]} instead of {digest[:9]}")

    async def answer(self, requests: pa.Table, digest: str, policy: Sequence[Any]) -> pa.Table:
        """Answer the rows of a `request_table` under a policy (see `serve`), all in flight together."""
        await self.serve(digest, policy)
        answers = await asyncio.gather(*(self._answer(row) for row in requests.to_pylist()))
        return answer_table(answers)

    async def _answer(self, row: Mapping[str, Any]) -> Answer:
        from vllm import SamplingParams

        key, kind, ids = row["key"], row["kind"], row["ids"]
        if kind == "generate":
            asked = json.loads(row["sampling"])
            # the text is only needed to find a stop string
            sampling = SamplingParams(**asked, detokenize=bool(asked.get("stop")))
            output = await self._run(ids, sampling)
            return Answer(key, tokens=list(output.outputs[0].token_ids))
        if kind == "score":
            found = await self._score(ids, row["start"])
            return Answer(key, logprobs=[each.logprob for each in found], greedy=[each.rank == 1 for each in found])
        targets = row["targets"]
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=len(targets),
            logprob_token_ids=targets,
            ignore_eos=True,
            detokenize=False,
        )
        [choice] = (await self._run(ids, sampling)).outputs
        [likely] = choice.token_ids
        return Answer(
            key,
            logprobs=[choice.logprobs[0][token].logprob for token in targets],
            greedy=[token == likely for token in targets],
        )

    async def _score(self, ids: list[int], start: int) -> list[Any]:
        """vLLM's `Logprob` of each of `ids[start:]`.

        Reads the prefix cache, which vLLM does not do for prompt log-probabilities: the choices of a question share
        their context, and questions share their examples. Cached tokens have no log-probabilities, so a request that
        finds a part of its continuation in the cache is computed again.
        """
        from vllm import SamplingParams

        for reading in (True, False):
            sampling = SamplingParams(
                max_tokens=1,
                temperature=0.0,
                prompt_logprobs=0,
                detokenize=False,
                skip_reading_prefix_cache=not reading,
                extra_args={SCORED_FROM: start},
            )
            output = await self._run(ids, sampling)
            if output.num_cached_tokens < start:
                break
        first = len(output.prompt_logprobs) - len(ids) + start  # on a GPU cached tokens have no entries
        return [entry[token] for entry, token in zip(output.prompt_logprobs[first:], ids[start:], strict=True)]
