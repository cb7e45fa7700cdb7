"""Stage `evaluate` as a Ray job; options are those of `lorapar evaluate`.

ray job submit --working-dir . -- python jobs/evaluate.py --config FILE --run-dir DIR
ray job submit --working-dir . -- python jobs/evaluate.py --model MODEL --tasks gsm8k --out DIR
"""

from entry import job

if __name__ == "__main__":
    job("evaluate")
