"""The whole pipeline as a Ray job.

    ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/configs/quickstart.yaml --run-dir DIR

Options are those of `lorapar run`. DIR must be on storage that every node can reach. Submitted again, on this cluster
or on another, it resumes from DIR.
"""

from entry import job

if __name__ == "__main__":
    job("run")
