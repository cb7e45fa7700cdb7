"""A run directory in an object store (`s3://`, `gs://`), through pyarrow's file systems.

An object store has no rename, no append, no lock and no folder, and code that reads models, tables and checkpoints
wants files. So each process works on a *mirror*, an ordinary folder on its own disk, and what is finished is copied:

    driver ── push: data, then JSON, then manifest.json ──► s3://bucket/run ◄── push: what the job may write ── workers
       └─◄─ pull: what the job has written ────────────────────┘   └─── pull, once per machine (`cache`) ──────►──┘

- An object appears whole. A push begins with logs and ends with `manifest.json`, so a stage that is half copied is no
  stage, and a folder's JSON comes after its tensors, so a checkpoint or an adapter that is half copied is none.
- One command at a time has the run: see `claims`. What it finds at its start is the whole truth; a mirror that is left
  on the machine is used again only if nobody has worked on the run in between.
- Only the driver and the workers of one stage write, each its own files, as on a shared disk.
"""

INDEX, TOKEN, COMPLETE = OF_A_MIRROR = (".mirror.json", ".session", ".complete")
"""A mirror's own files: what was copied under which stamp; the token of its last session; whether that one could copy
everything."""
