# ruff: noqa: E501  (programs on one line)
"""Programs that attack the sandbox. Each defines `f`; its kind says what it must not achieve.

- FORGERIES give wrong answers and try to pass: the tests below are false, so `passed` means that the attack worked.
- ESCAPES return what they could access, or nothing.
- FLOODS use up what they can.

`SECRET`, `WITNESS`, `PORT`, `ABSTRACT`, `PID` and `MARK` are replaced by a file, a folder, a TCP port, an abstract
socket's name and a process of the outside, and a name for what an attack leaves behind; `SCRATCH` by a folder that an
attack may fill where its layer lets it write.
"""

from __future__ import annotations

from textwrap import dedent

FALSE = "assert f(2) == 4"
FRAME = "def frame(text):\n    data = text.encode()\n    return len(data).to_bytes(4, 'big') + data\n"

FORGERIES: dict[str, tuple[str, str]] = {
    "exit early": ("import os\ndef f(x): os._exit(0)", FALSE),
    "exit while defining": ("import os\nos._exit(0)", FALSE),
    "sys.exit": ("import sys\ndef f(x): sys.exit(0)", FALSE),
    "keyboard interrupt": ("def f(x): raise KeyboardInterrupt", FALSE),
    "print the verdict": (
        FRAME
        + dedent(
            """
            import os
            def f(x):
                for text in ('{"reason": "passed", "detail": ""}', '{"end": 0}', '{"started": true}', 'passed'):
                    print(text, flush=True)
                    for fd in range(64):
                        try:
                            os.write(fd, frame(text))
                        except OSError:
                            pass
                return 5
            """
        ),
        FALSE,
    ),
    "override __eq__": (
        "class Yes:\n    def __eq__(self, other): return True\n    __ne__ = None\ndef f(x): return Yes()",
        FALSE,
    ),
    "equal integer": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return Yes(5)",
        FALSE,
    ),
    "equal list": (
        "class Yes(list):\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "assert f(2) == [4]",
    ),
    "equal float": (
        "class Yes(float):\n    def __sub__(self, o): return 0.0\n    __rsub__ = __abs__ = __sub__\ndef f(x): return Yes(9)",
        "assert abs(f(2) - 4.0) < 1e-6",
    ),
    "patch the built-ins": (
        dedent(
            """
            import builtins
            for name in ('all', 'abs', 'set', 'len', 'sorted', 'isinstance', 'exec', 'compile'):
                setattr(builtins, name, lambda *a, **k: True)
            builtins.AssertionError = type('Quiet', (Exception,), {})
            def f(x): return 5
            """
        ),
        FALSE,
    ),
    "define what the tests use": (
        "sorted = set = list = lambda x: [4]\ndef f(x): return [5]",
        "assert sorted(f(2)) == [4]",
    ),
    "patch the harness": (
        dedent(
            """
            import sys, types
            for name, module in list(sys.modules.items()):
                if name.startswith('inside'):
                    for key, value in list(vars(module).items()):
                        if isinstance(value, types.FunctionType) and key != 'main':
                            setattr(module, key, lambda *a, **k: ['reason', 'passed'])
            def f(x): return 5
            """
        ),
        FALSE,
    ),
    "read the tests from the stack": (
        dedent(
            """
            import gc, re, sys
            def f(x):
                frame = sys._getframe()
                seen = []
                while frame:
                    seen += [repr(value) for value in {**frame.f_globals, **frame.f_locals}.values()]
                    frame = frame.f_back
                seen += [each for each in gc.get_objects() if isinstance(each, str)]
                seen += [repr(each) for each in gc.get_objects() if isinstance(each, (dict, list, tuple))]
                found = re.search(r'assert f\\(\\d+\\) == (4141)', ' '.join(seen))
                return int(found.group(1)) if found else None
            """
        ),
        "assert f(2) == 4141",
    ),
    "search all memory for the tests": (
        dedent(
            """
            import ctypes, re
            def f(x):
                try:
                    maps = open('/proc/self/maps').read().splitlines()
                except OSError:
                    return None
                for line in maps:
                    start, end = (int(each, 16) for each in line.split()[0].split('-'))
                    if 'rw' in line and end - start < 2**24:
                        found = re.search(rb'f.2. == (41' + rb'41)', ctypes.string_at(start, end - start))
                        if found:
                            return int(found.group(1))
            """
        ),
        "assert f(2) == 4141",
    ),
    "answer with a verdict": (
        FRAME
        + 'import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, frame(\'{"reason": "passed"}\'))\n'
        "        except OSError: pass\n    import time; time.sleep(9)",
        FALSE,
    ),
    "answer ahead, then nonsense": (
        FRAME
        + "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, frame('[[[') + b'\\xff' * 99)\n"
        "        except OSError: pass\n    return 5",
        FALSE,
    ),
    "answer nested deeply": (
        FRAME
        + "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, frame('[\"value\", ' + '[' * 99999))\n"
        "        except OSError: pass\n    return 5",
        FALSE,
    ),
    "hang up": (
        "import os, time\ndef f(x):\n    os.closerange(3, 64)\n    time.sleep(9)",
        "try:\n    f(2)\nexcept Exception:\n    pass",
    ),
    "die within the tests' try": (
        "import os\ndef f(x): os._exit(0)",
        "try:\n    f(2)\nexcept BaseException:\n    pass",
    ),
    "stop the tests' loop": (
        "def f(x): raise StopIteration",
        "assert all(map(f, [2]))\nfor y in map(f, [2]): assert y == 4",
    ),
    "stop the tests' loop by a subclass": (
        "class Stop(StopIteration, LookupError): pass\ndef f(x): raise Stop",
        "assert list(map(f, [2])) == []",
    ),
    "pretend an exit": (
        FRAME + "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        '        try: os.write(fd, frame(\'["raised", ["SystemExit", "BaseException"], "SystemExit", "0"]\'))\n'
        "        except OSError: pass\n    return 5",
        FALSE,
    ),
    "exit from a thread": (
        "import os, threading, time\ndef f(x):\n    threading.Thread(target=lambda: os._exit(0)).start()\n    time.sleep(9)",
        FALSE,
    ),
    "exit at the end": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 5", FALSE),
    "change the argument": ("def f(x):\n    x.clear()\n    return []", "x = [3, 1]\nassert f(x) == sorted(x)"),
    "true to everything": (
        "class Yes:\n    def __getattr__(self, name): return lambda *a, **k: 4\ndef f(x): return Yes()",
        "y = f(2)\nassert y.real == 4",
    ),
    "a name that is a lie": (
        "class E(Exception): pass\nE.__name__ = 'ValueError'; E.__module__ = 'builtins'\nE.__qualname__ = 'ValueError'\n"
        "def f(x): raise E",
        "f(2)",
    ),
}

SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.syscall.restype = ctypes.c_long\n"


def _syscall(number: int, *arguments: object, before: str = "") -> str:
    listed = "".join(f", {each}" for each in arguments)
    return f"{SYSCALL}{before}\ndef f():\n    return libc.syscall(ctypes.c_long({number}){listed}) >= 0"


def _tries(*attempts: str, imports: str = "") -> str:
    """A program that returns the result of the first successful attempt."""
    body = "".join(
        f"    try:\n        got = {each}\n        if got: return repr(got)[:200]\n    except Exception: pass\n"
        for each in attempts
    )
    return f"import os, sys\n{imports}\ndef f():\n{body}    return ''"


OPEN = "open({!r}).read(99)"

FILES: dict[str, str] = {  # not prevented by the layer `process`
    "read a secret": _tries(OPEN.format("SECRET"), "os.listdir(os.path.dirname('SECRET'))"),
    "read home": _tries("os.listdir(os.path.expanduser('~'))", "os.listdir('/home') or os.listdir('/root/.ssh')"),
    "read other users' files": _tries(OPEN.format("/etc/shadow"), OPEN.format("/etc/passwd"), "os.listdir('/var')"),
    "read processes": _tries("[each for each in os.listdir('/proc') if each.isdigit() and int(each) != os.getpid()]"),
    "read the environment of others": _tries(*(f"open('/proc/{pid}/environ').read(9)" for pid in ("1", "PID", "self"))),
    "through another's root": _tries("os.listdir('/proc/PID/root/')", "os.listdir('/proc/1/cwd/')"),
    "read memory of others": _tries("open('/proc/PID/mem', 'rb', buffering=0)", "open('/proc/PID/maps').read(9)"),
    "write outside": _tries(
        *(
            f"open('{folder}/MARK', 'w').write('x')"
            for folder in ("WITNESS", "/var/tmp", "/dev/shm", "/usr/lib", "", "/root")
        )
    ),
    "append to the secret": _tries("open('SECRET', 'a').write('x')", "os.truncate('SECRET', 0) is None"),
    "change the standard library": _tries("open(os.__file__, 'a').write(' ')", "open(sys.executable, 'ab').write(b'')"),
    "change the harness": _tries(
        "[open(os.path.join(p, 'inside', 'wire.py'), 'a') for p in sys.path if os.path.isdir(p + '/inside')]"
    ),
    "reopen by path": _tries(
        "os.open(f\"/proc/self/fd/{os.open('SECRET', os.O_PATH)}\", os.O_RDONLY)",
        "os.open('secret', os.O_RDONLY, dir_fd=os.open(os.path.dirname('SECRET'), os.O_PATH))",
    ),
    "attributes of the secret": _tries("os.getxattr('SECRET', 'user.note')", "os.listxattr('SECRET')"),
    "exchange the secret": _syscall(316, -100, "b'SECRET'", -100, "b'WITNESS'", 2),
    "symlink to the secret": _tries("os.symlink('SECRET', '/tmp/MARK') or open('/tmp/MARK').read()"),
    "hard link to the secret": _tries("os.link('SECRET', '/tmp/MARK') or open('/tmp/MARK').read()"),
    "climb out": _tries("os.listdir('/tmp/../../../../../home')", "os.chdir('WITNESS') or open('../secret').read()"),
    "rename the secret": _tries("os.rename('SECRET', 'SECRET.MARK') is None", "os.unlink('SECRET') is None"),
    "write kernel settings": _tries(
        "open('/proc/sys/kernel/hostname', 'w').write('MARK')", "open('/proc/self/oom_score_adj', 'w').write('0')"
    ),
    "move to another cgroup": _tries("open('/sys/fs/cgroup/pids/cgroup.procs', 'w').write('0')", "os.listdir('/sys')"),
    "devices": _tries(
        *(f"open('/dev/{each}', 'rb', buffering=0)" for each in ("vda", "mem", "kmsg", "tty", "fuse", "kvm"))
    ),
    "shared memory of Python": _tries(
        "shared_memory.SharedMemory('MARK', create=True, size=99).name",
        imports="from multiprocessing import shared_memory",
    ),
}

IOCTL = "fcntl.ioctl(os.open(os.__file__, os.O_RDONLY), {}, bytes({}))"
FLAG = "struct.pack('l', 64 | struct.unpack('l', fcntl.ioctl(file, 0x80086601, bytes(8)))[0])"

ESCAPES: dict[str, str] = {
    "flags of a library's file": _tries(
        f"[fcntl.ioctl(file, 0x40086602, {FLAG}) for file in [os.open(os.__file__, os.O_RDONLY)]]",
        IOCTL.format(0x80086601, 8),
        imports="import fcntl, struct",
    ),
    "its extended flags": _tries(IOCTL.format(0x801C581F, 28), imports="import fcntl"),
    "its version": _tries(IOCTL.format(0x80087601, 8), imports="import fcntl"),
    "verity on it": _tries(IOCTL.format(0x40806685, 128), imports="import fcntl"),
    "lock it": _tries("fcntl.flock(open(os.__file__), fcntl.LOCK_EX | fcntl.LOCK_NB) is None", imports="import fcntl"),
    "its mode and owner by descriptor": _tries(
        "os.fchmod(os.open(os.__file__, os.O_RDONLY), 0o644) is None",
        "os.fchown(os.open(os.__file__, os.O_RDONLY), 0, 0) is None",
        "os.utime(os.open(os.__file__, os.O_RDONLY)) is None",
    ),
    "slots of asynchronous input": _syscall(206, 1, "ctypes.byref(ctypes.c_void_p())"),
    "room of the user's pipes": _tries("fcntl.fcntl(os.pipe()[1], 1031, 2**20)", imports="import fcntl"),
    "huge pages": SYSCALL + "def f():\n    libc.mmap.restype = ctypes.c_void_p\n"
    "    return libc.mmap(0, 2**21, 3, 0x40022, -1, 0) != 2**64 - 1 or ctypes.get_errno() != 1",
    "a core of its own": SYSCALL + "def f():\n    return libc.prctl(62, 1, 0, 0, 0) == 0",
    "become another user": _tries(
        *("os.setuid(65534) is None", "os.setgid(65534) is None", "os.setgroups([]) is None"),
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)) is None",
    ),
    "timers of the user": SYSCALL
    + dedent(
        """
        def f():
            n, timer = 0, ctypes.c_int(0)
            while n < 1000 and libc.syscall(ctypes.c_long(222), 0, 0, ctypes.byref(timer)) >= 0:
                n += 1
            return n > 64
        """
    ),
    "attributes that no limit counts": _tries(
        "open('SCRATCH/x', 'w').close() or os.setxattr('SCRATCH/x', 'user.a', bytes(60000)) is None"
    ),
    "environment": _tries("[each for each in os.environ if each not in ('PWD', 'LC_CTYPE')]"),
    "connect to the network": _tries(
        "socket.create_connection(('127.0.0.1', PORT), 1)",
        "socket.create_connection(('::1', PORT), 1)",
        imports="import socket",
    ),
    "send a datagram": _tries(
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))", imports="import socket"
    ),
    "listen": _tries("socket.create_server(('127.0.0.1', 0))", imports="import socket"),
    "other families of sockets": _tries(
        *(
            f"socket.socket({family}, {kind})"
            for family, kind in ((16, 3), (17, 3), (38, 5), (40, 1), (2, 3), (1, 1), (1, 2))
        ),
        imports="import socket",
    ),
    "abstract socket": _tries("socket.socket(socket.AF_UNIX).connect('\\0ABSTRACT') is None", imports="import socket"),
    "socket in the file system": _tries(
        "socket.socket(socket.AF_UNIX).connect('WITNESS/socket') is None", imports="import socket"
    ),
    "pair that sends elsewhere": _tries(
        "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', 'WITNESS/datagrams')",
        "socket.socketpair(type=socket.SOCK_DGRAM)[0].connect('WITNESS/datagrams') is None",
        "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, 'WITNESS/datagrams')",
        imports="import socket",
    ),
    "kill the parent": _tries("os.kill(os.getppid(), 9) is None", "os.kill(PID, 0) is None"),
    "kill all": _tries("os.kill(-1, 0) is None", "os.killpg(os.getpgid(PID), 0) is None", "os.kill(1, 0) is None"),
    "signal by queue": _syscall(129, "PID", 0, "ctypes.create_string_buffer(128)"),
    "signal a thread": _syscall(200, "PID", 0),
    "signal a group's thread": _syscall(234, "PID", "PID", 0),
    "pidfd": _syscall(434, "PID", 0),
    "signal by owner": _tries(
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PID) == 0",
        "fcntl.fcntl(os.pipe()[0], 10, 9) == 0",
        imports="import fcntl",
    ),
    "lease on shared files": _tries("fcntl.fcntl(open(os.__file__), 1024, 1) == 0", imports="import fcntl"),
    "watch a folder": _tries("fcntl.fcntl(os.open('/usr/lib', os.O_RDONLY), 1026, 1) == 0", imports="import fcntl"),
    "network interfaces": _tries(
        "fcntl.ioctl(socket.socketpair()[0], 0x8912, bytes(16))",
        "fcntl.ioctl(0, 0x8912, bytes(16))",
        imports="import fcntl, socket",
    ),
    "pair of another family": _tries("socket.socketpair(30, socket.SOCK_STREAM)", imports="import socket"),
    "limits of the parent": _tries("resource.prlimit(PID, resource.RLIMIT_NOFILE, (9, 9))", imports="import resource"),
    "affinity of the parent": _tries("os.sched_setaffinity(PID, {0}) is None", "os.setpriority(0, PID, 19) is None"),
    "raise its own limits": _tries(
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)) is None",
        "resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)) is None",
        imports="import resource",
    ),
    "outlive the parent": SYSCALL + "def f():\n    return libc.prctl(1, 0, 0, 0, 0) == 0",
    "trace the parent": _syscall(101, 16, "PID", 0, 0),
    "be traced": _syscall(101, 0, 0, 0, 0),
    "read another process": _syscall(310, "PID", 0, 0, 0, 0, 0),
    "io_uring": _syscall(425, 8, "ctypes.create_string_buffer(256)"),
    "mount": _syscall(165, "b'none'", "b'/tmp'", "b'tmpfs'", 0, 0),
    "new mount calls": _syscall(430, "b'tmpfs'", 0),
    "bind mount": _syscall(428, -100, "b'/'", 1),
    "umount": _syscall(166, "b'/tmp'", 2),
    "pivot_root": _syscall(155, "b'/tmp'", "b'/tmp'"),
    "chroot": _syscall(161, "b'/usr'"),
    "unshare": _syscall(272, 0x10000000),
    "setns": _syscall(308, 0, 0),
    "clone into a namespace": _syscall(56, 0x10000000 | 0x00010000 | 0x0800 | 0x0100, 0, 0, 0, 0),
    "clone3": _syscall(435, "(ctypes.c_uint64 * 11)(0x10000000)", 88),
    "keyctl": _syscall(250, 0, -4, 1),
    "add_key": _syscall(248, "b'user'", "b'MARK'", "b'x'", 1, -4),
    "bpf": _syscall(321, 0, "ctypes.create_string_buffer(128)", 128),
    "perf": _syscall(298, "ctypes.create_string_buffer(128)", 0, -1, -1, 0),
    "userfaultfd": _syscall(323, 1),
    "memfd": _syscall(319, "b'MARK'", 0),
    "secret memory": _syscall(447, 0),
    "kernel log": _syscall(103, 10, 0, 0),
    "host name": _syscall(170, "b'MARK'", 4),
    "personality": _syscall(135, 0x0400000),
    "shared memory left behind": _syscall(29, 0x51AB51AB, 4096, 0o1600),
    "semaphores left behind": _syscall(64, 0x51AB51AB, 1, 0o1600),
    "messages left behind": _syscall(68, 0x51AB51AB, 0o1600),
    "POSIX queue left behind": _syscall(240, "b'MARK'", 0o102, 0o600, 0),
    "capabilities back": _syscall(
        126, "(ctypes.c_uint32 * 2)(0x20080522, 0)", "(ctypes.c_uint32 * 6)(*([2**32 - 1] * 6))"
    ),
    "handles of files": _syscall(304, -100, "ctypes.create_string_buffer(128)", 0),
    "mode of the secret": _tries("os.chmod('SECRET', 0o777) is None", "os.chown('SECRET', 0, 0) is None"),
    "times of the secret": _tries(
        "os.utime('SECRET', (1, 1)) is None", "os.setxattr('SECRET', 'user.MARK', b'x') is None"
    ),
    "new mode call": _syscall(452, -100, "b'SECRET'", 0o777, 0),
    "watch files": _syscall(294, 0),
    "32-bit system calls": (
        SYSCALL
        + dedent(
            """
            import mmap
            def f():
                page = mmap.mmap(-1, 4096, prot=7)
                page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, 20 (getpid); int 0x80; ret
                return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() > 0
            """
        )
    ),
    "x32 system calls": _syscall(0x40000000 + 39),
    "file descriptors of others": dedent(
        """
        import os, stat
        def f():
            kinds = []
            for fd in range(3, 256):
                try:
                    kinds.append(stat.S_IFMT(os.fstat(fd).st_mode))
                except OSError:
                    pass
            return [kind for kind in kinds if kind != stat.S_IFSOCK] or len(kinds) > 1
        """
    ),
}

PROCESSES: dict[str, str] = {  # must not start, or must end with the job
    "fork bomb": "import os\ndef f():\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "double fork": dedent(
        """
        import os, time
        def f():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.closerange(0, 64)
                    time.sleep(300)
                os._exit(0)
            while True: time.sleep(1)
        """
    ),
    "daemon without output": dedent(
        """
        import os, signal, time
        for each in range(1, 32):
            try: signal.signal(each, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def f():
            for _ in range(5):
                if os.fork() == 0:
                    os.setsid()
                    os.closerange(0, 64)
                    while True: pass
            raise ValueError('left them')
        """
    ),
    "spawn": "import subprocess\ndef f():\n    subprocess.Popen(['/bin/sleep', '300'], start_new_session=True)\n    return 5",
    "execute": "import os, glob\ndef f():\n    os.execv((glob.glob('/bin/sleep') + ['/usr/lib/klibc'])[0], ['sleep', '300'])",
    "library's process": "import ctypes\ndef f():\n    ctypes.CDLL(None).system(b'sleep 300 &')\n    return 5",
    "memory of many": dedent(
        """
        import os
        def f():
            for _ in range(8):
                os.fork()
            data = [bytearray(2**20) for _ in range(99999)]
        """
    ),
}

FLOODS: dict[str, str] = {
    "memory": "def f():\n    data = []\n    while True: data.append(bytearray(2**20))",
    "memory at once": "def f(): return len(bytearray(2**40))",
    "mapped memory": "import mmap\ndef f():\n    return [mmap.mmap(-1, 2**26).write(b'x' * 2**26) for _ in range(999)] and 5",
    "disk": "def f():\n    with open('SCRATCH/big', 'wb') as file:\n        while True: file.write(b'x' * 2**20)",
    "many files": "def f():\n    n = 0\n    while True:\n        open(f'SCRATCH/{n}', 'w').write('x' * 4096)\n        n += 1",
    "sparse file": "import os\ndef f():\n    os.truncate(os.open('SCRATCH/sparse', os.O_CREAT | os.O_RDWR), 2**40)",
    "output": "def f():\n    while True: print('x' * 2**16)",
    "errors": "import sys\ndef f():\n    while True: sys.stderr.write('x' * 2**16)",
    "endless loop": "def f():\n    while True: pass",
    "endless definition": "while True: pass",
    "sleep": "import time\ndef f(): time.sleep(300)",
    "sleep that ignores signals": (
        "import signal, time\nfor each in range(1, 65):\n    try: signal.signal(each, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ndef f():\n    while True: time.sleep(300)"
    ),
    "stop itself": "import signal\ndef f(): signal.raise_signal(signal.SIGSTOP)",
    "threads": "import threading, time\ndef f():\n    while True: threading.Thread(target=time.sleep, args=(300,)).start()",
    "small threads": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "def f():\n    while True: threading.Thread(target=time.sleep, args=(300,)).start()"
    ),
    "thread that goes on": "import threading\ndef g():\n    while True: pass\ndef f():\n    threading.Thread(target=g).start()\n    return 5",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n=0): return f(n + 1)",
    "deep recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    x = []\n    for _ in range(10**6): x = [x]\n    return repr(x)"
    ),
    "nested result": "def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "result within itself": "def f():\n    x = []\n    x.append(x)\n    return x",
    "huge integer": "def f(): return 10 ** 10 ** 10",
    "huge integer as text": "import sys\nsys.set_int_max_str_digits(0)\ndef f(): return str(7 ** 10 ** 7)",
    "long integer result": "def f(): return 1 << 2**28",
    "regex of 2 GB": "import re\ndef f(): return re.compile('a' * 2**31)",
    "regex that backtracks": "import re\ndef f(): return re.match('(a+)+$', 'a' * 64 + 'b')",
    "endless result": "import itertools\ndef f(): return itertools.count()",
    "long result": "def f(): return list(range(10**7))",
    "colliding result": "def f(): return {n * (2**61 - 1) for n in range(10**5)}",
    "colliding result past the encoder": (
        "import json, os\ndef f():\n    form = ['s', [['i', hex(n * (2**61 - 1))] for n in range(4 * 10**5)]]\n"
        "    data = json.dumps(['value', form]).encode()\n"
        "    data = memoryview(len(data).to_bytes(4, 'big') + data)\n    while data: data = data[os.write(3, data):]\n"
        "    while True: pass"
    ),
    "half an answer": "import os, time\ndef f():\n    os.write(3, (2**24).to_bytes(4, 'big') + b'[')\n    time.sleep(300)",
    "deep folders": "import os\ndef f():\n    while True:\n        os.mkdir('d')\n        os.chdir('d')",
    "output past the writer": (
        "import ctypes, mmap\nclass V(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]\n"
        "def f():\n    data = mmap.mmap(-1, 2**16)\n"
        "    part = V(ctypes.addressof(ctypes.c_char.from_buffer(data)), 2**16)\n"
        "    while True: ctypes.CDLL(None).vmsplice(1, ctypes.byref(part), 1, 0)"
    ),
    "open files": "def f():\n    files = []\n    while True: files.append(open('/dev/null'))",
    "pipes": "import os\ndef f():\n    while True:\n        r, w = os.pipe()\n        os.set_blocking(w, False)\n        os.write(w, b'x' * 2**20)",
    "error that hangs": "class E(Exception):\n    def __str__(self):\n        while True: pass\ndef f(): raise E",
    "truth that hangs": "class T:\n    def __bool__(self):\n        while True: pass\ndef f(): return T()",
    "crash": "import ctypes\ndef f(): ctypes.string_at(0)",
    "abort": "import os\ndef f(): os.abort()",
    "nested source": "x = " + "(" * 5000 + ")" * 5000 + "\ndef f(): return 5",
    "compressed bomb": "import zlib\ndef f():\n    d = zlib.compress(bytes(2**24))\n    return zlib.decompress(d * 1) * 999",
    "sums of ranges": "def f(): return sum(range(10**12))",
    "long string": "def f(): return 'x' * 2**28",
    "empty files": "import itertools, os\ndef f():\n    for n in itertools.count(): os.close(os.open(f'SCRATCH/{n}', os.O_CREAT))",
    "descriptors in flight": (
        "import socket\ndef f():\n    a, b = socket.socketpair()\n    while True: socket.send_fds(a, [b'x'], [0] * 200)"
    ),
}
