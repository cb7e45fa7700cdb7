"""Stage `grpo` as a Ray job; options are those of `lorapar grpo`.

ray job submit --working-dir . -- python jobs/grpo.py --config FILE --run-dir DIR
"""

from entry import job

if __name__ == "__main__":
    job("grpo")
