"""A seccomp filter for programs that nobody has read: a classic BPF program, as bwrap's option --seccomp takes it.

In: the machine's architecture. Out: bytes. The filter refuses system calls that reach the kernel's rarely used parts,
and allows all others. A refused call fails with EPERM; the program goes on. A call of another architecture or of the
x32 ABI ends the program. Source of the format: linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import errno
import platform
import struct

from prefill_router.errors import InputError

# Numbers of the calls on x86_64 and aarch64, from asm/unistd_64.h and asm-generic/unistd.h; None where there is none.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # parts of the kernel with a history of faults
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    # administration of the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    # memory that belongs to no process, and so to none of its limits
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
}
CLONE, CLONE3, SOCKET, IOCTL = (56, 220), (435, 435), (41, 198), (16, 29)
LAST_KNOWN = 462  # mseal, Linux 6.10. Later calls fail with ENOSYS, as on an older kernel.

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # bit of a call of the x32 ABI
NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6. Others, such as AF_VSOCK, can reach out of the network namespace.
TERMINAL = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX put characters into the input of a terminal

LOAD, EQUAL, ABOVE, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
NUMBER, ARCH, FIRST, SECOND = 0, 4, 16, 24  # offsets in struct seccomp_data; of arguments, their low 32 bits
KILL, ALLOW = 0x80000000, 0x7FFF0000


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter for an architecture, by default this machine's. Raises InputError if it is unknown."""
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise InputError(f"the sandbox knows the architectures {' and '.join(AUDIT_ARCH)}, this machine is {machine!r}")
    column = list(AUDIT_ARCH).index(machine)
    program = [
        _one(LOAD, ARCH),
        _one(EQUAL, AUDIT_ARCH[machine], skip_if_true=1),
        _one(RETURN, KILL),
        _one(LOAD, NUMBER),
    ]
    if machine == "x86_64":
        program += _answer(AT_LEAST, X32, KILL)
    program += _answer(ABOVE, LAST_KNOWN, _error(errno.ENOSYS))
    # The C library starts threads with clone3 and falls back to clone, whose flags a filter can read.
    program += _answer(EQUAL, CLONE3[column], _error(errno.ENOSYS))
    program += _call(CLONE[column], FIRST, _answer(ANY_BIT, NAMESPACES, _error(errno.EPERM)), ALLOW)
    families = [one for family in FAMILIES for one in _answer(EQUAL, family, ALLOW)]
    program += _call(SOCKET[column], FIRST, families, _error(errno.EAFNOSUPPORT))
    terminal = [one for request in TERMINAL for one in _answer(EQUAL, request, _error(errno.EPERM))]
    program += _call(IOCTL[column], SECOND, terminal, ALLOW)
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            program += _answer(EQUAL, number, _error(errno.EPERM))
    return b"".join([*program, _one(RETURN, ALLOW)])


def _one(code: int, value: int, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if_true, skip_if_false, value)


def _answer(test: int, value: int, result: int) -> list[bytes]:
    """Returns `result` if the loaded value passes the test."""
    return [_one(test, value, skip_if_false=1), _one(RETURN, result)]


def _call(number: int, argument: int, tests: list[bytes], otherwise: int) -> list[bytes]:
    """Tests of an argument of one call, which is the last that the filter does for it."""
    body = [_one(LOAD, argument), *tests, _one(RETURN, otherwise)]
    return [_one(EQUAL, number, skip_if_false=len(body)), *body]


def _error(number: int) -> int:
    return 0x00050000 | number
