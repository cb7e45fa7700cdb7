"""θ selection: elements per second compared with a sort and a row-by-row walk, and memory at 10^9 elements.

    python jobs/benchmarks/selection.py [--quick] --json FILE

Three methods for the same set at θ = 0.9, on products of Gaussians (the shape of a Taylor score on a Gaussian adapter):
ours (`keep_top`, exact); `torch.sort` with a float64 cumulative sum, with all of torch's threads; and a pandas frame
with a row per element, sorted and walked with `iterrows`, as in the paper's public script. The last case reads 10^9
scores from memory-mapped safetensors shards just written (so from the page cache, not from the disk) and writes the
mask; its memory is the peak of this process's private pages, which leaves the mapped files out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from _memory import private_memory
from _rows import Row, print_table, write_rows
from safetensors.torch import save_file
from torch import Tensor

from lorapar_ray.partition.select import keep_top, select_shards

THETA = 0.9
SHARD = 10**8
GOAL_SECONDS, GOAL_GIB = 60.0, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10^6 elements, seconds instead of minutes")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    arguments = parser.parse_args()
    rows = [against_sort(10**power) for power in range(5, 7 if arguments.quick else 9)]
    rows += [against_pandas(10**power) for power in range(5, 6 if arguments.quick else 7)]
    if not arguments.quick:
        rows += billion()
    print_table(rows)
    write_rows(arguments.json, rows)


def against_sort(elements: int) -> Row:
    scores = draw(elements, seed=0)
    ours, kept = rate(elements, lambda: int(keep_top({"scores": scores}, THETA)["scores"].sum()))
    peer, kept_by_sort = rate(elements, lambda: int(sort_and_sum(scores).sum()))
    agree(kept, kept_by_sort)
    return comparison(f"θ selection, {elements:.0e} elements, vs torch.sort + cumsum", ours, peer)


def against_pandas(elements: int) -> Row:
    scores = draw(elements, seed=0)
    ours, kept = rate(elements, lambda: int(keep_top({"scores": scores}, THETA)["scores"].sum()))
    peer, kept_by_walk = rate(elements, lambda: walk_rows(scores), repeats=1)
    agree(kept, kept_by_walk)
    return comparison(f"θ selection, {elements:.0e} elements, vs pandas iterrows", ours, peer)


def billion() -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="selection-") as name:
        shards = [Path(name) / f"scores-{number:02d}.safetensors" for number in range(10)]
        for number, shard in enumerate(shards):
            save_file({f"layers.{number:02d}": draw(SHARD, seed=number)}, shard)
        with private_memory() as memory:
            start = time.perf_counter()
            select_shards(shards, THETA, Path(name) / "mask.safetensors")
            seconds = time.perf_counter() - start
    gib = memory.peak / 2**30
    what = "θ selection of 10^9 memory-mapped elements"
    return [
        Row(f"{what}: time", seconds, None, "s", None, f"≤ {GOAL_SECONDS:.0f} s", seconds <= GOAL_SECONDS),
        Row(f"{what}: memory", gib, None, "GiB", None, f"≤ {GOAL_GIB:.0f} GiB", gib <= GOAL_GIB),
    ]


def draw(elements: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal(elements, dtype=np.float32)
    scores *= generator.standard_normal(elements, dtype=np.float32)
    return torch.from_numpy(np.abs(scores, out=scores))


def sort_and_sum(scores: Tensor) -> Tensor:
    ranked, order = scores.sort(descending=True)
    reached = ranked.cumsum(0, dtype=torch.float64)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[order[: int(torch.searchsorted(reached, THETA * reached[-1])) + 1]] = True
    return mask


def walk_rows(scores: Tensor) -> int:
    frame = pd.DataFrame({"position": np.arange(scores.numel()), "importance": scores.numpy()})
    goal, reached, kept = THETA * frame["importance"].sum(), 0.0, []
    for _, row in frame.sort_values("importance", ascending=False).iterrows():
        if reached >= goal:
            break
        reached += row["importance"]
        kept.append(row["position"])
    return len(kept)


def rate(elements: int, select: Callable[[], int], repeats: int = 3) -> tuple[float, int]:
    """Elements per second of the fastest repeat, and the number of kept elements."""
    fastest, kept = float("inf"), 0
    for _ in range(repeats):
        start = time.perf_counter()
        kept = select()
        fastest = min(fastest, time.perf_counter() - start)
    return elements / fastest, kept


def agree(exact: int, rounded: int) -> None:
    """Check that the peers' floating-point sums change the number of kept elements by about one at most."""
    if abs(exact - rounded) > max(2, exact * 1e-5):
        raise SystemExit(f"the ways disagree: {exact} elements kept exactly, {rounded} by the peer")


def comparison(name: str, ours: float, peer: float) -> Row:
    return Row(name, ours, peer, "elements/s", ours / peer, "> 1", ours > peer)


if __name__ == "__main__":
    main()
