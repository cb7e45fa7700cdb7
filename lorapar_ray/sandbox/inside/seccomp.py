"""The system calls that tested code may make, as a classic BPF program for seccomp (x86-64).

Calls newer than `rseq` are refused unless listed, so the calls of a future kernel are refused too.
"""

from __future__ import annotations

import errno
import struct

ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000
LAST_OLD = 334
"""`rseq`; the numbers from 335 to 423 are not used."""
NEW_ALLOWED = (436, 439, 441, 449)
"""close_range, faccessat2, epoll_pwait2, futex_waitv."""
CLONE, FORK, VFORK, CLONE3, EXECVE, EXECVEAT = 56, 57, 58, 435, 59, 322
CLONE_THREAD = 0x00010000
CLONE_NEW = 0x7E020000
"""Every CLONE_NEW* flag: user, PID, mount, network, IPC, UTS and cgroup namespaces."""

NEVER = (
    *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(165, 166, 155, 161, 272, 308),  # mount, umount2, pivot_root, chroot, unshare, setns
    *(167, 168, 169, 170, 171, 172, 173, 175, 176, 313, 246, 320),  # swap, reboot, names, ports, modules, kexec
    *(321, 298, 323, 300, 301),  # bpf, perf_event_open, userfaultfd, fanotify
    *(248, 249, 250),  # add_key, request_key, keyctl
    *(163, 164, 159, 227, 305, 103, 179, 180, 212, 153, 154, 135, 303, 304),  # accounting, clocks, log, quota, handles
    319,  # memfd_create: memory that the address space does not count
    *(29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71),  # System V memory, semaphores and queues outlive a process
    *(240, 241, 242, 243, 244, 245),  # POSIX queues too
    *(41, 42, 43, 49, 50, 288, 46, 307),  # socket, connect, accept, bind, listen, accept4, sendmsg, sendmmsg
    *(62, 200, 129, 297),  # kill, tkill, rt_sigqueueinfo, rt_tgsigqueueinfo
    *(141, 142, 144, 203, 314, 251, 256, 279),  # priorities, affinity and memory placement, of other processes too
    *(253, 254, 294),  # inotify: who reads which of the shared files, and when
    *(162, 306),  # sync, syncfs
    73,  # flock: a lock on a read-only file blocks every other process that locks it
    *(206, 207, 208, 209, 210),  # asynchronous input and output: the machine has a fixed number of slots
    *(188, 189, 190),  # setting extended attributes, which do not count in the size of /tmp
)
METADATA = (
    *(90, 91, 268, 92, 93, 94, 260),  # chmod, chown
    *(132, 235, 261, 280),  # utime
    *(191, 192, 193, 194, 195, 196, 197, 198, 199),  # reading, listing and removing extended attributes
    *(133, 259),  # mknod
)
"""Not covered by Landlock: a file's mode, owner, times and attributes."""
LOCKS = (6, 7, 37, 38)
"""fcntl: F_SETLK, F_SETLKW and those of open files; for programs that write their own files, such as sqlite."""
DEVICE_CONTROL = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Allowed ioctl requests: TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.

Others change a file that is only open for reading (its flags, its version), type into a terminal, or control a device.
"""
MAP_HUGETLB = 0x40000

_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _ABOVE, _ANY, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06


def program(*, processes: bool, metadata: bool, execute: bool | None = None, pid: int | None = None) -> bytes:
    """The filter, 8 bytes an instruction.

    Args:
        processes: whether it may start processes; threads are always allowed.
        execute: whether it may execute another program; None: as `processes`.
        metadata: whether it may change modes, owners and times of files, read attributes, and lock files (if all files
            are its own).
        pid: the filtered process, which may then signal only itself; None: any process that it can see.
    """
    denied = _ERRNO | errno.EPERM
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_ABOVE, 0, 1, X32_BIT - 1),
        (_RETURN, 0, 0, _KILL),
    ]
    listed = [*NEVER, *(() if metadata else METADATA), *(() if processes else (FORK, VFORK))]
    if not (processes if execute is None else execute):
        listed += [EXECVE, EXECVEAT]
    for number in listed:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    # clone3 passes its flags in memory, which a filter cannot read; the C library falls back to clone
    code += [(_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    code += _on_argument(CLONE, 0, [(_ANY, 0, 1, CLONE_NEW), (_RETURN, 0, 0, denied)])
    if not processes:
        code += _on_argument(CLONE, 0, [(_ANY, 1, 0, CLONE_THREAD), (_RETURN, 0, 0, denied)])
    code += _unless_zero(302, 0, denied)  # prlimit64 of another process
    code += _unless_zero(44, 4, denied)  # sendto an address
    for option in (1, 62):  # prctl: PR_SET_PDEATHSIG, PR_SCHED_CORE (keeps others off a core)
        code += _on_argument(157, 0, [(_EQUAL, 0, 1, option), (_RETURN, 0, 0, denied)])
    # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX make the kernel send signals; F_SETLEASE stops others' writes, F_NOTIFY
    # watches folders, and F_SETPIPE_SZ uses up the user's total pipe size
    for command in (8, 10, 15, 1024, 1026, 1031, *(() if metadata else LOCKS)):
        code += _on_argument(72, 1, [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, denied)])
    code += _on_argument(53, 0, [(_EQUAL, 1, 0, 1), (_RETURN, 0, 0, denied)])  # socketpair of another family than Unix
    code += _on_argument(9, 3, [(_ANY, 0, 1, MAP_HUGETLB), (_RETURN, 0, 0, denied)])  # mmap of huge pages
    past = reversed(range(1, len(DEVICE_CONTROL) + 1))
    allowed = [(_EQUAL, jump, 0, request) for jump, request in zip(past, DEVICE_CONTROL, strict=True)]
    code += _on_argument(16, 1, [*allowed, (_RETURN, 0, 0, denied)])
    if pid is not None:
        code += _on_argument(234, 0, [(_EQUAL, 1, 0, pid), (_RETURN, 0, 0, denied)])  # tgkill
    for number in NEW_ALLOWED:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code += [(_ABOVE, 0, 1, LAST_OLD), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *each) for each in code)


def _on_argument(number: int, argument: int, test: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """If the call is `number`, apply `test` to the low half of its argument; then load the call's number again."""
    body = [(_LOAD, 0, 0, 16 + 8 * argument), *test, (_LOAD, 0, 0, 0)]
    return [(_EQUAL, 0, len(body), number), *body]


def _unless_zero(number: int, argument: int, result: int) -> list[tuple[int, int, int, int]]:
    low, high = 16 + 8 * argument, 20 + 8 * argument
    body = [
        (_LOAD, 0, 0, low),
        (_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, high),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, result),
        (_LOAD, 0, 0, 0),
    ]
    return [(_EQUAL, 0, len(body), number), *body]
