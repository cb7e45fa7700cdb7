"""Runs programs that a model wrote against their tests. No Ray in here: usable alone.

    with Sandbox() as sandbox:
        [verdict] = sandbox.run([Job("def add(a, b): return a + b", "assert add(2, 2) == 4", ("add",))])

Two confined processes decide a job. One holds the program, the other the tests; only calls, arguments and results cross
between them, as plain data, and the verdict comes from the process of the tests over a socket that the program's does
not have. So a program cannot print its verdict, end before its tests do, replace `assert`, override `__eq__`, or find
the expected values anywhere: all that it can do is answer calls.

Layers, strongest first (`lorapar doctor` tells which one a machine gets, and why not a better one):

- `bubblewrap`: own namespaces for users, processes, mounts, network and IPC; the root holds Python and nothing else.
- `sandlock`: Landlock and a system call filter, for pods without user namespaces; one process, nothing writable.
- `process`: resource limits and the filter, only where a config names it; keeps accidents away, not attackers.

What it does NOT protect against:

- Faults of the kernel. Namespaces, Landlock and seccomp share it with everything else; only a virtual machine does not.
- Side channels: timing, caches, the load of the machine. Programs share its cores and slow each other down.
- Weak tests. A program that answers exactly what the tests ask passes, even if it only lists the answers; and tests
  that `eval` a result hand their process, and the verdict, to the program.
- A fault of CPython in the tests' process: it parses the program's answers (JSON, built into plain values).
- `sandlock`: names, sizes and times of files, and where symbolic links lead, can be found out (Landlock hides neither
  `stat` nor `readlink`); contents and extended attributes cannot.
- `sandlock` and `process` where no cgroup can be made: the number of threads is bounded by the address space alone.
- `bubblewrap` where no cgroup can be made: how many empty files a program makes in its /tmp is bounded by its seconds
  alone; each takes about a kilobyte of the kernel's memory until the job ends.
- `process`: reads of every file that this user may read, and writes where this user may write.
- Denial of service below the limits: each job may use all of its seconds, memory and output.

Tests see results by value: an argument that the program changes in place stays as it was, and an object of a class of
the program's own is only true or false to them.
"""

from lorapar_ray.sandbox.choice import choose, survey
from lorapar_ray.sandbox.examination import Job, SandboxError, Verdict
from lorapar_ray.sandbox.limits import Limits
from lorapar_ray.sandbox.sandbox import Sandbox

__all__ = ["Job", "Limits", "Sandbox", "SandboxError", "Verdict", "choose", "survey"]
