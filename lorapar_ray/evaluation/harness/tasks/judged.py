"""What this folder's task files call by name; the work is in `lorapar_ray.evaluation.harness.judges`."""

from lorapar_ray.evaluation.harness.judges import humaneval, mbpp, mbpp_shots, numeric, right, word_problems

__all__ = ["humaneval", "mbpp", "mbpp_shots", "numeric", "right", "word_problems"]
