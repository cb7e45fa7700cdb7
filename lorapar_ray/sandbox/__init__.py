"""Runs programs that a model wrote against their tests. Does not use Ray; works standalone.

    with Sandbox() as sandbox:
        [verdict] = sandbox.run([Job("def add(a, b): return a + b", "assert add(2, 2) == 4", ("add",))])

Two confined processes run a job. One runs the program, the other the tests. They exchange only calls, arguments and
results, as plain data. The process of the tests sends the verdict over a socket that the program's process does not
have. So a program cannot print its verdict, end before its tests, replace `assert`, override `__eq__`, or find the
expected values: it can only answer calls.

Layers, strongest first (`lorapar doctor` shows a machine's layer, and why a stronger one does not work):

- `bubblewrap`: own namespaces for users, processes, mounts, network and IPC; the root contains only Python.
- `sandlock`: Landlock and a system call filter, for pods without user namespaces; one process, nothing writable.
- `process`: resource limits and the filter, only if a config names it; protects against accidents, not attackers.

What it does NOT protect against:

- Kernel bugs. With namespaces, Landlock and seccomp all processes share one kernel; only a virtual machine has its own.
- Side channels: timing, caches, the load of the machine. Programs share cores and slow each other down.
- Weak tests. A program that only lists the tested answers passes; and tests that `eval` a result give their process,
  and the verdict, to the program.
- A CPython bug in the tests' process, which parses the program's answers (JSON, converted to plain values).
- `sandlock`: programs can read names, sizes and times of files and the targets of symbolic links (Landlock does not
  block `stat` and `readlink`), but no contents and no extended attributes.
- `sandlock` and `process` without cgroups: only the address space limits the number of threads.
- `bubblewrap` without cgroups: only the time limit bounds the number of empty files in /tmp; each takes about a
  kilobyte of kernel memory until the job ends.
- `process`: reads of every file that this user may read, and writes where this user may write.
- Denial of service below the limits: each job may use all of its seconds, memory and output.

Tests see results by value: changes of an argument in place are lost, and an object of the program's own class appears
to the tests only as true or false.
"""

from lorapar_ray.sandbox.choice import choose, survey
from lorapar_ray.sandbox.examination import Job, SandboxError, Verdict
from lorapar_ray.sandbox.limits import Limits
from lorapar_ray.sandbox.sandbox import Sandbox

__all__ = ["Job", "Limits", "Sandbox", "SandboxError", "Verdict", "choose", "survey"]
