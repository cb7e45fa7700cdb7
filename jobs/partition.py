"""Stage `partition` as a Ray job; options are those of `lorapar partition`.

ray job submit --working-dir . -- python jobs/partition.py --config FILE --run-dir DIR
"""

from entry import job

if __name__ == "__main__":
    job("partition")
