"""The whole pipeline as a Ray job.

    ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/configs/quickstart.yaml --run-dir DIR

Options are those of `lorapar run`. DIR must be on storage that every node can reach.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted working directory, uninstalled

from lorapar_ray.cli import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    if not any(word.startswith(("--run-dir", "-d")) for word in sys.argv[1:]):
        sys.exit("lorapar: --run-dir: give a directory that every node can reach; the job's own goes when it ends")
    sys.argv.insert(1, "run")
    main()
