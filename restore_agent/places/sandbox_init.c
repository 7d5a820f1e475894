/*
 * sandbox-init: makes a replica's namespaces and is pid 1 in them.
 *
 *   sandbox-init CONTROL_FD KDAT_FILE ROOT [STEP POINT WITH]...
 *
 * ROOT is an empty folder; the steps make on it, in their order, what the replica sees as its file system, each at POINT (relative to
 * it; `.` is the root, which comes first). Which steps: layer.py says, and why.
 *   overlay   mounts an overlay there; WITH: its flags, a colon, its options
 *   bind      puts the machine's own folder of that name there, with all that is mounted in it; WITH is `-`
 *   single    the same without what is mounted in it
 *   tmpfs     an empty file system in memory; WITH: its options
 *   proc      the replica's own /proc; WITH is `-`
 *
 * The agent holds the other end of CONTROL_FD, a UNIX seqpacket socket. It is the lifeline: when it closes, by exit or crash of the
 * agent, this process ends and the kernel kills everything in the pid namespace. A program of its own, not Python: it starts within a
 * millisecond, and CRIU cannot be pid 1 itself, since it would hide the exit codes of what it restores.
 *
 * Agent -> init, fields ended by NUL, descriptors by SCM_RIGHTS (they become 1, 2, 3, ... of the program; 0 is /dev/null):
 *   spawn FLAGS DIRECTORY ARGC ARG... ENVC ENV...      FLAGS: s = seccomp filter, p = pids from FIRST_ENGINE_PID on, - = none
 * Init -> agent:
 *   ready PID           the host's pid of init; from its outer half
 *   bare POINT: WHY     no overlay could be mounted there: it is the machine's own
 *   gone POINT          nothing was left to mount it over
 *   inside              the namespaces are set up
 *   spawned PID         as seen inside
 *   exited PID STATUS   as wait() gives it, for every child, restored ones too
 *   error TEXT
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "not_carried.h"

#define MAX_MESSAGE (4 << 20) /* a command and its environment, of which the kernel takes 2 MiB at most */
#define MAX_FDS 16
/* The same pids come back at a restore. The first ones are left to init and to CRIU's own processes. */
#define FIRST_ENGINE_PID "1000"

static int control;
static int is_program; /* this process is about to become the program that was asked for */

static void tell(const char *format, ...)
{
	char text[512];
	va_list args;

	va_start(args, format);
	int n = vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (n > (int)sizeof(text) - 1)
		n = sizeof(text) - 1;
	if (send(control, text, n, MSG_NOSIGNAL) < 0 && errno == EPIPE)
		_exit(0);
}

static void fail(const char *what)
{
	if (is_program) {
		/* The agent reads the program's stderr and quotes it. */
		dprintf(2, "cannot start: %s: %s\n", what, strerror(errno));
		_exit(127);
	}
	tell("error %s: %s", what, strerror(errno));
	_exit(1);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fail(path);
	close(fd);
}

static void copy_file(const char *from, const char *to)
{
	char buffer[65536];
	int in = open(from, O_RDONLY | O_CLOEXEC);
	if (in < 0)
		return; /* no cache yet: CRIU makes one */
	int out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (out < 0)
		fail(to);
	ssize_t n;
	while ((n = read(in, buffer, sizeof(buffer))) > 0)
		if (write(out, buffer, n) != n)
			fail(to);
	if (n < 0)
		fail(from); /* CRIU would take half of it for all */
	close(in);
	close(out);
}

static void loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo" };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request) < 0)
		fail("loopback");
	request.ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		fail("loopback up");
	close(fd);
}

static void bind_folder(const char *point, unsigned int recursive)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "/%s", point);
	int folder = syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive);
	if (folder < 0 && errno == ENOENT)
		return; /* it was unmounted meanwhile */
	if (folder < 0 || syscall(SYS_move_mount, folder, "", AT_FDCWD, point, MOVE_MOUNT_F_EMPTY_PATH) < 0)
		fail(path);
	close(folder);
}

/* Where the machine's kind of file system cannot lie under an overlay, it stays as it is: the agent is told, and says so. */
static void mount_overlay(const char *point, char *with)
{
	char *options;
	unsigned long flags = strtoul(with, &options, 10);

	if (mount("overlay", point, "overlay", flags, options + 1) == 0)
		return;
	if (!strcmp(point, "."))
		fail("mount the replica's own layer over the machine's file system");
	if (errno == ENOENT) {
		tell("gone %s", point);
		return;
	}
	tell("bare %s: %s", point, strerror(errno));
	bind_folder(point, 0);
}

/* Missing folders on the way to a mount point that is ours: of /run, which is empty, and of what the machine has and the layer hides. */
static void make_point(const char *point)
{
	char path[PATH_MAX];

	snprintf(path, sizeof(path), "%s", point);
	for (char *slash = strchr(path, '/');; slash = strchr(slash + 1, '/')) {
		if (slash)
			*slash = 0;
		if (mkdir(path, 0755) < 0 && errno != EEXIST)
			fail(path);
		if (!slash)
			return;
		*slash = '/';
	}
}

static void make_mounts(const char *kdat, const char *root, char **steps)
{
	if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		fail("make mounts private");
	if (chdir(root) < 0)
		fail(root);
	mode_t mask = umask(0);
	for (; *steps; steps += 3) {
		char *step = steps[0], *point = steps[1], *with = steps[2];
		unsigned long flags = MS_NOSUID | MS_NODEV;

		if (!strcmp(step, "overlay")) {
			mount_overlay(point, with);
		} else if (!strcmp(step, "bind") || !strcmp(step, "single")) {
			make_point(point);
			bind_folder(point, strcmp(step, "bind") ? 0 : AT_RECURSIVE);
		} else if (!strcmp(step, "tmpfs")) {
			if (mount("tmpfs", point, "tmpfs", flags, with) < 0)
				fail(point);
		} else if (!strcmp(step, "proc")) {
			if (mount("proc", point, "proc", flags | MS_NOEXEC, NULL) < 0)
				fail(point);
		} else {
			errno = EINVAL;
			fail(step);
		}
		if (!strcmp(point, ".") && chdir(root) < 0) /* onto what was mounted */
			fail(root);
	}
	/* CRIU keeps what it probed of the kernel in /run/criu.kdat, and trusts it only on a tmpfs. */
	copy_file(kdat, "run/criu.kdat");
	if (mkdir("run/zerowake", 0755) < 0 || mkdir("run/zerowake/control", 0755) < 0)
		fail("make /run/zerowake/control");
	/* What is mapped must be known to the agent by the path that it has in here: so this is the namespace's root, and no chroot. */
	if (syscall(SYS_pivot_root, ".", ".") == 0) {
		if (umount2(".", MNT_DETACH) < 0)
			fail("leave the machine's file system");
	} else if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) {
		fail("enter the replica's file system"); /* EINVAL: the machine runs from its initial ramdisk, which nothing can replace */
	}
	if (chdir("/") < 0)
		fail("/");
	umask(mask);
}

static char *next_field(char **cursor, char *end)
{
	char *field = *cursor;
	size_t left = end - field, n = strnlen(field, left);
	if (n == left) {
		errno = EBADMSG;
		fail("spawn request");
	}
	*cursor = field + n + 1;
	return field;
}

static char **next_list(char **cursor, char *end)
{
	long n = strtol(next_field(cursor, end), NULL, 10);
	if (n < 0 || n > end - *cursor) { /* each takes a byte at least */
		errno = EBADMSG;
		fail("spawn request");
	}
	char **list = calloc(n + 1, sizeof(char *));
	if (!list)
		fail("spawn request");
	for (long i = 0; i < n; i++)
		list[i] = next_field(cursor, end);
	return list;
}

static void run_program(char *message, size_t size, const int *fds, int nfds)
{
	char *cursor = message, *end = message + size;
	next_field(&cursor, end); /* "spawn" */
	char *flags = next_field(&cursor, end), *directory = next_field(&cursor, end);
	char **argv = next_list(&cursor, end), **envp = next_list(&cursor, end);
	sigset_t none;

	if (!argv[0]) {
		errno = EBADMSG;
		fail("spawn request");
	}
	is_program = 1;
	if (setsid() < 0)
		fail("setsid");
	/* Inside, or the descriptor belongs to a mount of the host and cannot be dumped. */
	int null = open("/dev/null", O_RDWR);
	if (null < 0)
		fail("/dev/null");
	/* First out of the way of 0..nfds, then into place. */
	int moved[MAX_FDS];
	for (int i = 0; i < nfds; i++)
		if ((moved[i] = fcntl(fds[i], F_DUPFD, 64)) < 0)
			fail("dup");
	if (dup2(null, 0) < 0)
		fail("dup");
	for (int i = 0; i < nfds; i++)
		if (dup2(moved[i], i + 1) < 0)
			fail("dup");
	if (syscall(SYS_close_range, nfds + 1, ~0U, 0) < 0)
		fail("close_range"); /* the engine would have the agent's lifeline */
	if (chdir(directory) < 0)
		fail(directory);
	if (strchr(flags, 's') && refuse_what_is_not_carried() < 0)
		fail("seccomp filter");
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execvpe(argv[0], argv, envp);
	fail(argv[0]);
}

/* Returns the size of the message; 0: the other end has closed; -1: it is broken, or was too long, or lost descriptors. */
static ssize_t receive(char *message, int *fds, int *nfds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * MAX_FDS)];
	} ancillary;
	struct iovec part = { message, MAX_MESSAGE };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary) };
	ssize_t n = recvmsg(control, &header, MSG_CMSG_CLOEXEC);

	*nfds = 0;
	struct cmsghdr *cmsg = n > 0 ? CMSG_FIRSTHDR(&header) : NULL;
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
		*nfds = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(cmsg), *nfds * sizeof(int));
	}
	return n > 0 && header.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -1 : n;
}

static void serve(void)
{
	char *message = malloc(MAX_MESSAGE + 1);
	sigset_t children;
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	int signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
	if (!message || signals < 0)
		fail("signalfd");
	struct pollfd watched[2] = { { control, POLLIN, 0 }, { signals, POLLIN, 0 } };

	for (;;) {
		if (poll(watched, 2, -1) < 0 && errno != EINTR)
			fail("poll");
		if (watched[1].revents) {
			struct signalfd_siginfo ignored;
			int status;
			while (read(signals, &ignored, sizeof(ignored)) > 0)
				;
			for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
				tell("exited %d %d", pid, status);
		}
		if (watched[0].revents) {
			int fds[MAX_FDS], nfds;
			ssize_t n = receive(message, fds, &nfds);
			if (n <= 0)
				_exit(0);
			message[n] = 0;
			if (strcmp(message, "spawn")) {
				tell("error unknown request");
				for (int i = 0; i < nfds; i++)
					close(fds[i]);
				continue;
			}
			if (n > 6 && strchr(message + 6, 'p'))
				write_file("/proc/sys/kernel/ns_last_pid", FIRST_ENGINE_PID);
			pid_t pid = fork();
			if (pid == 0)
				run_program(message, n, fds, nfds);
			if (pid < 0)
				tell("error fork: %s", strerror(errno));
			else
				tell("spawned %d", pid);
			for (int i = 0; i < nfds; i++)
				close(fds[i]);
		}
	}
}

int main(int argc, char **argv)
{
	if (argc < 7 || (argc - 4) % 3) {
		fprintf(stderr, "usage: sandbox-init CONTROL_FD KDAT_FILE ROOT [STEP POINT WITH]... (started by the restore agent)\n");
		return 2;
	}
	control = atoi(argv[1]);
	fcntl(control, F_SETFD, FD_CLOEXEC);
	sigset_t children;
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	sigprocmask(SIG_BLOCK, &children, NULL);

	struct clone_args args = {
		.flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC,
		.exit_signal = SIGCHLD,
	};
	pid_t pid = syscall(SYS_clone3, &args, sizeof(args));
	if (pid < 0)
		fail("new namespaces (the agent must run as root)");
	if (pid > 0) {
		/* The outer half only waits, so that the agent has a child of its own to wait for. */
		int status;
		tell("ready %d", pid);
		close(control);
		if (waitpid(pid, &status, 0) < 0)
			return 1;
		return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	}
	/* If the outer half is killed, so is everything inside. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	make_mounts(argv[2], argv[3], argv + 4);
	loopback_up();
	tell("inside");
	serve();
}
