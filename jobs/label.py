"""Stage `label` as a Ray job; options are those of `lorapar label`.

ray job submit --working-dir . -- python jobs/label.py --config FILE --run-dir DIR
"""

from entry import job

if __name__ == "__main__":
    job("label")
