"""A run directory in an object store (`s3://`, `gs://`), through pyarrow's file systems.

An object store has no rename, no append, no lock and no folder, and code that reads models, tables and checkpoints
needs files. So each process works on a *mirror*, an ordinary folder on its own disk, and finished files are copied:

    driver ── push: data, then JSON, then manifest.json ──► s3://bucket/run ◄── push: what the job may write ── workers
       └─◄─ pull: what the job has written ────────────────────┘   └─── pull, once per machine (`cache`) ──────►──┘

- An object appears whole; one whose file breaks off during the upload is deleted. A push begins with logs and ends with
  `manifest.json`, so a half-copied stage does not count as finished. A folder's JSON is copied after its tensors, so a
  half-copied checkpoint or adapter is ignored.
- One command at a time holds the run: see `claims`. It starts from the store's content; a mirror left on the machine is
  reused only if no other session has written to the run since.
- Only the driver and the workers of one stage write, each its own files, as on a shared disk.
"""

INDEX, TOKEN, COMPLETE = OF_A_MIRROR = (".mirror.json", ".session", ".complete")
"""A mirror's own files: the stamp under which each file was copied; the token of its last session; whether that session
copied everything."""
PROBE = ".probe-"
"""What the files of `probe` begin with; a check that is killed leaves them."""
