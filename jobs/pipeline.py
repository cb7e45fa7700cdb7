"""The whole pipeline as a Ray job.

    ray job submit --working-dir . -- python jobs/pipeline.py --config jobs/configs/quickstart.yaml

Options are those of `lorapar run`. The run directory must be on storage that every node can reach.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted working directory, uninstalled

from lorapar_ray.cli import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.argv.insert(1, "run")
    main()
