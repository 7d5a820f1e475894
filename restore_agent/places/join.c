/*
 * join: what the agent does inside a running container.
 *
 *   join run REPORT_FD INIT_PIDFD PROGRAM_FD OOM_SCORE CGROUP_FD,... PASSED_FD,... ARG...
 *
 * starts a program of the node's there, with the agent's rights, as a child of the container's pid 1. The descriptors PASSED become
 * 1, 2, 3, ... of the program; 0 is /dev/null. REPORT gets the program's pid as the container sees it, then its end, or after it why the
 * program could not be started.
 *
 *   join view REPORT_FD INIT_PIDFD PATH all|one
 *
 * sends (SCM_RIGHTS) a copy of the mount at PATH, with all mounts below it or alone, on which no symbolic link is followed: so that the
 * agent may use paths in a tenant's file system. /proc/PID/root will not do: links in it lead into the agent's own.
 *
 * The program is opened on the node and executed by its descriptor: nothing of it comes from the container's file system, whose tenant
 * would otherwise run code with the agent's rights. For the same reason it has to be linked statically: the loader would read the
 * container's libraries. The cgroups come first, so that nothing is ever charged to the agent. Forked twice: the kernel gives an orphan
 * to pid 1 of its parent's pid namespace, and CRIU makes what it restores the children of its own parent; so that pid 1 reaps both and
 * learns their exit codes. `nsenter` was rejected: it leaves its child outside of pid 1's sight, and knows no cgroups.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 16
#define OUT_OF_THE_WAY 100

static int report;

static void fail(const char *what)
{
	dprintf(report, "%s: %s", what, strerror(errno));
	_exit(1);
}

/* Numbers separated by commas; "-" is none. */
static int numbers(const char *text, int *found)
{
	int n = 0;
	for (char *end; *text && *text != '-' && n < MAX_FDS; text = *end ? end + 1 : end)
		found[n++] = strtol(text, &end, 10);
	return n;
}

static int aside(int fd)
{
	int moved = fcntl(fd, F_DUPFD_CLOEXEC, OUT_OF_THE_WAY);
	if (moved < 0)
		fail("dup");
	return moved;
}

static void run(int program, const int *passed, int count, char **arguments, char **environment)
{
	struct timespec moment = { 0, 50000 };

	/* CRIU restores the engine as a child of its parent: that has to be pid 1 by then, not the process in between. */
	while (getppid() != 1)
		nanosleep(&moment, NULL);
	setsid();
	umask(022);
	dprintf(report, "%d\n", getpid());
	report = aside(report);
	program = aside(program);
	int moved[MAX_FDS];
	for (int i = 0; i < count; i++)
		moved[i] = aside(passed[i]);
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0 || dup2(null, 0) < 0)
		fail("/dev/null");
	for (int i = 0; i < count; i++)
		if (dup2(moved[i], i + 1) < 0)
			fail("dup");
	/* All others, whatever the agent's numbers are: who waits for the end of the report would wait for the program's. */
	if (syscall(SYS_close_range, count + 1, ~0U, CLOSE_RANGE_CLOEXEC) < 0)
		fail("close_range");
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	syscall(SYS_execveat, program, "", arguments, environment, 0x1000 /* AT_EMPTY_PATH */);
	fail("execute");
}

static int start(int init, char **argv, char **environment)
{
	int program = atoi(argv[0]), cgroups[MAX_FDS], passed[MAX_FDS];
	int joined = numbers(argv[2], cgroups), count = numbers(argv[3], passed);

	for (int i = 0; i < joined; i++)
		if (write(cgroups[i], "0", 1) != 1)
			fail("join the container's cgroup");
	/* What is restored inherits it. Lowering it below the agent's own would take a capability that is not worth having. */
	int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (score >= 0 && write(score, argv[1], strlen(argv[1])) < 0 && errno != EACCES)
		fail("set oom_score_adj");
	if (setns(init, CLONE_NEWCGROUP | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS) < 0)
		fail("enter the container's namespaces");
	pid_t between = fork();
	if (between == 0) {
		pid_t child = fork();
		if (child == 0)
			run(program, passed, count, argv + 4, environment);
		if (child < 0)
			fail("fork");
		_exit(0);
	}
	int status;
	if (between < 0 || waitpid(between, &status, 0) < 0)
		fail("fork in the container");
	return status ? 1 : 0;
}

static int view(int init, const char *path, int all)
{
	struct open_how how = { .flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS };
	struct mount_attr attributes = { .attr_set = MOUNT_ATTR_NOSYMFOLLOW | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID };
	unsigned below = all ? AT_RECURSIVE : 0;
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} ancillary = { 0 };
	struct iovec part = { "view", 4 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = sizeof(ancillary) };

	if (setns(init, CLONE_NEWNS) < 0)
		fail("enter the container's mount namespace");
	int place = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how));
	if (place < 0)
		fail(path);
	int tree = syscall(SYS_open_tree, place, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | below);
	if (tree < 0)
		fail("copy the mount");
	if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | below, &attributes, sizeof(attributes)) < 0)
		fail("forbid links on the copy of the mount");
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(rights), &tree, sizeof(int));
	return sendmsg(report, &message, MSG_NOSIGNAL) < 0;
}

int main(int argc, char **argv, char **environment)
{
	if (argc >= 9 && !strcmp(argv[1], "run")) {
		report = atoi(argv[2]);
		return start(atoi(argv[3]), argv + 4, environment);
	}
	if (argc == 6 && !strcmp(argv[1], "view")) {
		report = atoi(argv[2]);
		return view(atoi(argv[3]), argv[4], !strcmp(argv[5], "all"));
	}
	fprintf(stderr, "join is started by the restore agent\n");
	return 2;
}
