"""The seccomp policy of pods that are snapshotted and restored, as the container runtime's plugin gives it to their engines' containers.

What CRIU cannot carry and runtimes do without is refused to engines as in a sandbox (places/not_carried.h says what and why). The policy
takes the place of the runtime's default in such pods, so it refuses as well what that is there for: calls that reach the kernel's own
settings, other namespaces, keys and modules. What is left is allowed: a list of all that engines need would have to follow every library.

Rejected: a profile in the kubelet's folder that pods name. The kubelet makes no container whose profile is not there, so that on a node on
which no agent had started yet a pod did not start at all.
"""

from __future__ import annotations

import functools
from typing import Any

from zerowake_proto import nri_pb2

_ENOSYS, _EINVAL, _EPERM, _EPROTONOSUPPORT, _EAFNOSUPPORT = 38, 22, 1, 93, 97
_ARCH_REQ_XCOMP_PERM = 0x1023
_FAMILIES = {1: "UNIX", 2: "INET", 10: "INET6", 16: "NETLINK", 17: "PACKET"}  # of sockets that CRIU carries
_PROTOCOLS = {33: "DCCP", 132: "SCTP", 256: "SMC", 262: "MPTCP"}  # of INET and INET6 that it does not
_ALARMS = {8: "CLOCK_REALTIME_ALARM", 9: "CLOCK_BOOTTIME_ALARM"}
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*
_REFUSED = [
    "_sysctl",
    "acct",
    "add_key",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "create_module",
    "delete_module",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mount",
    "mount_setattr",
    "move_mount",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "query_module",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "request_key",
    "setns",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "sysfs",
    "syslog",
    "umount",
    "umount2",
    "unshare",
    "uselib",
    "userfaultfd",
    "ustat",
    "vhangup",
    "vm86",
    "vm86old",
]


def profile() -> dict[str, Any]:
    """In the form of the OCI's runtime specification."""
    # clone3 hides its flags from a filter; without it libraries use clone.
    absent = ["io_uring_setup", "io_uring_enter", "io_uring_register", "clone3", "memfd_secret"]
    absent += ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"]
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            _errno(absent, _ENOSYS),
            _errno(["arch_prctl"], _EINVAL, {"index": 0, "value": _ARCH_REQ_XCOMP_PERM, "op": "SCMP_CMP_EQ"}),
            _errno(_REFUSED, _EPERM),
            _errno(["socket"], _EAFNOSUPPORT, {"index": 0, "value": max(_FAMILIES), "op": "SCMP_CMP_GT"}),
            *(
                _errno(["socket"], _EAFNOSUPPORT, {"index": 0, "value": family, "op": "SCMP_CMP_EQ"})
                for family in range(1, max(_FAMILIES))
                if family not in _FAMILIES
            ),
            *(
                _errno(
                    ["socket"],
                    _EPROTONOSUPPORT,
                    {"index": 0, "value": family, "op": "SCMP_CMP_EQ"},
                    {"index": 2, "value": protocol, "op": "SCMP_CMP_EQ"},
                )
                for family in (2, 10)
                for protocol in _PROTOCOLS
            ),
            *(_errno(["timerfd_create"], _EINVAL, {"index": 0, "value": clock, "op": "SCMP_CMP_EQ"}) for clock in _ALARMS),
            *(
                _errno(["clone"], _EPERM, {"index": 0, "value": 1 << bit, "valueTwo": 1 << bit, "op": "SCMP_CMP_MASKED_EQ"})
                for bit in range(32)
                if _NEW_NAMESPACES >> bit & 1
            ),
        ],
    }


@functools.cache
def policy() -> nri_pb2.LinuxSeccomp:
    """The profile, in the form of the plugin interface."""
    about = profile()
    return nri_pb2.LinuxSeccomp(default_action=about["defaultAction"], syscalls=[_syscall(rule) for rule in about["syscalls"]])


def _syscall(rule: dict[str, Any]) -> nri_pb2.LinuxSyscall:
    arguments = [
        nri_pb2.LinuxSeccompArg(index=each["index"], value=each["value"], value_two=each.get("valueTwo", 0), op=each["op"])
        for each in rule.get("args", [])
    ]
    errno = nri_pb2.OptionalUInt32(value=rule["errnoRet"])
    return nri_pb2.LinuxSyscall(names=rule["names"], action=rule["action"], errno_ret=errno, args=arguments)


def _errno(names: list[str], errno: int, *arguments: dict[str, object]) -> dict[str, object]:
    refusal: dict[str, object] = {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno}
    return {**refusal, "args": list(arguments)} if arguments else refusal
