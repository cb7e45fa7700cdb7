"""Stage `score` as a Ray job; options are those of `lorapar score`.

ray job submit --working-dir . -- python jobs/score.py --config FILE --run-dir DIR
"""

from entry import job

if __name__ == "__main__":
    job("score")
