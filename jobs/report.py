"""Stage `report` as a Ray job; options are those of `lorapar report`.

ray job submit --working-dir . -- python jobs/report.py --config FILE --run-dir DIR
"""

from entry import job

if __name__ == "__main__":
    job("report")
