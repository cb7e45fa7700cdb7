"""Stage `sft` as a Ray job; options are those of `lorapar sft`.

ray job submit --working-dir . -- python jobs/sft.py --config FILE --run-dir DIR
"""

from entry import job

if __name__ == "__main__":
    job("sft")
