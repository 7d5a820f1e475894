/*
 * What the kernel offers and CRIU 4.2 cannot carry is refused to engines as if the kernel lacked it, where runtimes ask for it unbidden and
 * do without. Each refusal is the answer of a kernel that was built without the feature, which every program has to expect:
 *
 *   io_uring                                   cannot be dumped; uvloop and Node open one
 *   MPTCP, SCTP, SMC, DCCP sockets             cannot be dumped; Go listens by MPTCP and falls back to TCP
 *   families but UNIX, INET, NETLINK, PACKET   cannot be dumped: vsock, AF_ALG, AF_XDP and others
 *   userfaultfd, memfd_secret, perf events, BPF, alarms (timerfd)   cannot be dumped
 *   Landlock                                   its rules cannot be dumped, and a domain that was entered is lost without a word
 *   key rings                                  lost without a word
 *   AMX's tile registers                       the permission is lost, and the engine dies of SIGILL at its first matrix
 *
 * In pods the same is refused by a profile (kubernetes/seccomp.py). What no runtime asks for unbidden is left to `snapshot create`, which
 * says what it is: a refusal in the middle of a program that needs the thing would say less.
 */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef ARCH_REQ_XCOMP_PERM
#define ARCH_REQ_XCOMP_PERM 0x1023
#endif
/* Headers of old distributions lack some of these; the numbers are the same on all architectures. */
#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#define __NR_landlock_add_rule 445
#define __NR_landlock_restrict_self 446
#endif
#ifndef __NR_memfd_secret
#define __NR_memfd_secret 447
#endif
enum { REFUSED_SCTP = 132, REFUSED_DCCP = 33, REFUSED_SMC = 256, REFUSED_MPTCP = 262, REALTIME_ALARM = 8, BOOTTIME_ALARM = 9 };

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
/* The low half of an argument: the kernel takes these as int. Little endian, as both architectures are. */
#define LOAD_ARGUMENT(n) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[n]))
#define IF_EQUAL(value, else_skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, else_skip)
#define SKIP_IF_EQUAL(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, skip, 0)
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define REFUSE(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define LACKS(call) IF_EQUAL(call, 1), REFUSE(ENOSYS)

/* For this process and what it starts. With CAP_SYS_ADMIN no_new_privs is not needed, so set-uid programs in the engine keep working. */
static int refuse_what_is_not_carried(void)
{
#if defined(__x86_64__)
	const uint32_t arch = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
	const uint32_t arch = AUDIT_ARCH_AARCH64;
#else
#error "sandbox-init knows x86_64 and aarch64"
#endif
	struct sock_filter filter[] = {
		LOAD(arch),
		SKIP_IF_EQUAL(arch, 1),
		ALLOW,
		LOAD(nr),
		LACKS(__NR_io_uring_setup),
		LACKS(__NR_userfaultfd),
		LACKS(__NR_memfd_secret),
		LACKS(__NR_perf_event_open),
		LACKS(__NR_bpf),
		LACKS(__NR_landlock_create_ruleset),
		LACKS(__NR_landlock_add_rule),
		LACKS(__NR_landlock_restrict_self),
		LACKS(__NR_add_key),
		LACKS(__NR_request_key),
		LACKS(__NR_keyctl),
#if defined(__x86_64__)
		IF_EQUAL(__NR_arch_prctl, 4),
		LOAD_ARGUMENT(0),
		IF_EQUAL(ARCH_REQ_XCOMP_PERM, 1),
		REFUSE(EINVAL),
		ALLOW,
#endif
		IF_EQUAL(__NR_timerfd_create, 5),
		LOAD_ARGUMENT(0),
		SKIP_IF_EQUAL(REALTIME_ALARM, 1),
		IF_EQUAL(BOOTTIME_ALARM, 1),
		REFUSE(EINVAL),
		ALLOW,
		IF_EQUAL(__NR_socket, 13),
		LOAD_ARGUMENT(0),
		SKIP_IF_EQUAL(AF_INET, 5),
		SKIP_IF_EQUAL(AF_INET6, 4),
		SKIP_IF_EQUAL(AF_UNIX, 9),
		SKIP_IF_EQUAL(AF_NETLINK, 8),
		SKIP_IF_EQUAL(AF_PACKET, 7),
		REFUSE(EAFNOSUPPORT),
		LOAD_ARGUMENT(2),
		SKIP_IF_EQUAL(REFUSED_MPTCP, 3),
		SKIP_IF_EQUAL(REFUSED_SCTP, 2),
		SKIP_IF_EQUAL(REFUSED_SMC, 1),
		IF_EQUAL(REFUSED_DCCP, 1),
		REFUSE(EPROTONOSUPPORT),
		ALLOW,
	};
	struct sock_fprog program = { .len = sizeof(filter) / sizeof(filter[0]), .filter = filter };

	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}
