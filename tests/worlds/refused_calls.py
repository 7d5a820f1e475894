"""What the kernel offers and engines are refused, in sandboxes and pods alike, since CRIU cannot carry it: calls, and the errno of each.

As a program it makes all of them and prints what each got, as JSON; 0 where the kernel did it.
"""

from __future__ import annotations

import ctypes
import errno
import json
from dataclasses import dataclass

NUMBERS = {  # of x86_64
    "arch_prctl": 158,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "timerfd_create": 283,
    "perf_event_open": 298,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
    "memfd_secret": 447,
    "socket": 41,
}
UNIX, INET, INET6, NETLINK, PACKET, ALG, VSOCK, SMC, XDP = 1, 2, 10, 16, 17, 38, 40, 43, 44
STREAM, DGRAM, RAW, SEQPACKET, DCCP_KIND = 1, 2, 3, 5, 6
DCCP, SCTP, SMC_PROTOCOL, MPTCP = 33, 132, 256, 262


@dataclass(frozen=True)
class Call:
    """A system call by its name, with its first three arguments."""

    name: str
    arguments: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}{self.arguments}"


REFUSED = {
    Call("io_uring_setup", (8, 0)): errno.ENOSYS,
    Call("userfaultfd", (1,)): errno.ENOSYS,
    Call("memfd_secret", (0,)): errno.ENOSYS,
    Call("landlock_create_ruleset", (0, 0, 1)): errno.ENOSYS,
    Call("landlock_add_rule", (0, 1, 0)): errno.ENOSYS,
    Call("landlock_restrict_self", (0, 0)): errno.ENOSYS,
    Call("perf_event_open", (0, 0, 0)): errno.ENOSYS,
    Call("bpf", (0, 0, 0)): errno.ENOSYS,
    Call("add_key", (0, 0, 0)): errno.ENOSYS,
    Call("request_key", (0, 0, 0)): errno.ENOSYS,
    Call("keyctl", (0, 0, 0)): errno.ENOSYS,
    Call("arch_prctl", (0x1023, 18)): errno.EINVAL,
    Call("timerfd_create", (8, 0)): errno.EINVAL,
    Call("timerfd_create", (9, 0)): errno.EINVAL,
    Call("socket", (INET, STREAM, MPTCP)): errno.EPROTONOSUPPORT,
    Call("socket", (INET6, STREAM, MPTCP)): errno.EPROTONOSUPPORT,
    Call("socket", (INET, STREAM, SCTP)): errno.EPROTONOSUPPORT,
    Call("socket", (INET6, SEQPACKET, SCTP)): errno.EPROTONOSUPPORT,
    Call("socket", (INET, STREAM, SMC_PROTOCOL)): errno.EPROTONOSUPPORT,
    Call("socket", (INET, DCCP_KIND, DCCP)): errno.EPROTONOSUPPORT,
    Call("socket", (SMC, STREAM, 0)): errno.EAFNOSUPPORT,
    Call("socket", (VSOCK, STREAM, 0)): errno.EAFNOSUPPORT,
    Call("socket", (ALG, SEQPACKET, 0)): errno.EAFNOSUPPORT,
    Call("socket", (XDP, RAW, 0)): errno.EAFNOSUPPORT,
}
ALLOWED = (
    Call("timerfd_create", (1, 0)),
    Call("socket", (UNIX, STREAM, 0)),
    Call("socket", (INET, STREAM, 0)),
    Call("socket", (INET, STREAM, 6)),
    Call("socket", (INET6, DGRAM, 17)),
    Call("socket", (NETLINK, RAW, 0)),
    Call("socket", (PACKET, RAW, 0)),
)


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    got = {}
    for call in [*REFUSED, *ALLOWED]:
        done = libc.syscall(ctypes.c_long(NUMBERS[call.name]), *(ctypes.c_ulong(argument) for argument in call.arguments))
        got[str(call)] = ctypes.get_errno() if done < 0 else 0
    print(json.dumps(got), flush=True)


if __name__ == "__main__":
    main()
