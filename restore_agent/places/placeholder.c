/*
 * zerowake-placeholder: pid 1 of a container that waits to be restored into.
 *
 *   zerowake-placeholder -- COMMAND ARG...    the container's own command, as the runtime would have started it
 *
 * It lies, with the agent's socket beside it, in a folder of the node that is mounted read-only into the pod. So it calls the agent, and
 * not the agent it: the kernel tells the agent the caller's pid, and by that the container, before a word was said, and no path of a
 * tenant's is ever followed. It needs no privilege and no file of the image. Three things can come of it:
 *   - the agent restores an engine beside it, whose processes the kernel gives it as children: it passes signals on and ends as it ends
 *   - it becomes the container's own command, as if it had never been (cold)
 *   - to take a snapshot it starts that command as a child, with pids that are free in a new container
 * A plain `sleep` was rejected: it reaps nobody, hides exit codes and stays when the engine has gone. So was a socket made by the
 * placeholder in a volume of the pod: the agent would follow a path that its tenant can move.
 *
 * A container that is asked to end (SIGTERM, or another stop signal) has answers under way. An engine that is pid 1, and has no handler, is
 * spared by the kernel and finishes them; beside this process it would die. So the signal is held until no connection to the engine's port
 * is open: the gateways send it nothing new by then, and keep no connection to it that is idle. Only then, or shortly before the
 * kubelet's patience ends and only if the engine takes the signal, is it passed on. What is open the kernel says, for all clients alike and
 * whether an agent runs or not. A word of the gateways' was rejected: it would miss clients that come by another way, and agents go.
 *
 * Seqpacket; fields ended by NUL.
 * Placeholder -> agent:  hello STATE PID ARGC ARG...   STATE: waiting, or engine (with its PID); at each connection
 *                        spawned PID                   answers start
 *                        idle                          answers engine 0: every child that has ended was told of
 *                        exited PID STATUS             as wait() gives it, for every child, restored ones too
 *                        asked SIGNAL                  the container is asked to end; again at each connection
 *                        error TEXT
 * Agent -> placeholder:  cold                          become the command
 *                        start ENVC ENV... ARG...      start this one as a child, ENV added to the container's own, for a snapshot
 *                        engine PID [PORT MS]          this child is the engine now: end as it ends; 0: none, wait on. A signal that asks
 *                                                      it to end is held while connections to PORT are open, MS milliseconds at most
 *                        until MS                      the signal is held for so long from now on at most
 *                        exit CODE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_MESSAGE (1 << 18)
#define SOCKET_NAME "agent.sock"
#define FIRST_ENGINE_PID 1000 /* lower ones stay free for this process and for CRIU's own */
#define PATIENCE_SECONDS 60   /* without any agent; then the container's own command starts */
#define RETRY_MILLISECONDS 100
#define REMEMBERED 64
#define LOOK_MILLISECONDS 25 /* between two looks at the connections while a signal is held */
#define QUIET_LOOKS 2	     /* without any, one after the other: a gateway may not have heard yet that nothing new is to be sent */

static char **own;   /* the container's command, ended by NULL */
static int own_count;
static char socket_path[sizeof(((struct sockaddr_un *)0)->sun_path)];
static int agent = -1;
static pid_t engine;
static unsigned port;	       /* of the engine; 0: nothing is held for it */
static double patience;	       /* seconds for which a signal is held at most */
static int asked;	       /* the signal that is held; 0: none */
static double deadline = -1;   /* of holding it; negative: none is known */
static int quiet;	       /* looks in a row that found no connection */
static int told_to_end;	       /* a stop signal was passed on: others are, too, at once */
static struct {
	pid_t pid;
	int status;
} reaped[REMEMBERED];
static unsigned reaped_count;

static void say(const char *what)
{
	dprintf(2, "zerowake-placeholder: %s\n", what);
}

static void tell(const char *message, size_t size)
{
	if (agent >= 0)
		send(agent, message, size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void tell_fields(const char *word, long first, long second)
{
	char text[128];
	int n = snprintf(text, sizeof(text), "%s%c%ld%c%ld%c", word, 0, first, 0, second, 0);
	tell(text, n);
}

static void tell_error(const char *what)
{
	char text[512];
	int n = snprintf(text, sizeof(text), "error%c%s: %s%c", 0, what, strerror(errno), 0);
	tell(text, n < (int)sizeof(text) ? n : (int)sizeof(text));
}

static void restore_signals(void)
{
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* An engine that knows snapshots would wait for one that never comes. */
static void no_snapshot_is_coming(void)
{
	unsetenv("SNAPSHOT_CONTROL_DIR");
	unsetenv("DYN_SNAPSHOT_CONTROL_DIR");
}

static void run(char **command)
{
	restore_signals();
	execvp(command[0], command);
	dprintf(2, "zerowake-placeholder: cannot start %s: %s\n", command[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

static void become(char **command)
{
	/* What an agent that was killed has left half restored. */
	if (getpid() == 1)
		kill(-1, SIGKILL);
	no_snapshot_is_coming();
	run(command);
}

static void start(char **command)
{
	pid_t pid;

	/* The same pids come back at a restore, where the first ones are taken. Counting up costs no privilege, and 50 ms once. */
	while ((pid = fork()) > 0 && pid < FIRST_ENGINE_PID - 1)
		waitpid(pid, NULL, 0);
	if (pid == 0)
		_exit(0);
	if (pid > 0)
		waitpid(pid, NULL, 0);
	pid = fork();
	if (pid < 0) {
		tell_error("fork");
		return;
	}
	if (pid == 0) {
		setsid();
		/* Opened here, or it belongs to a mount of the host and cannot be dumped. */
		int null = open("/dev/null", O_RDWR);
		if (null < 0 || dup2(null, 0) < 0)
			_exit(126);
		if (null > 2)
			close(null);
		/* All else is closed as it becomes the command; this is for what the runtime may have left open, and it may forbid the call. */
		syscall(SYS_close_range, 3, ~0U, 0);
		run(command);
	}
	engine = pid;
	tell_fields("spawned", pid, 0);
}

static void end_as(int status)
{
	_exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}

static void reap(void)
{
	int status;
	for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
		tell_fields("exited", pid, status);
		reaped[reaped_count % REMEMBERED].pid = pid;
		reaped[reaped_count++ % REMEMBERED].status = status;
		if (pid == engine)
			end_as(status);
	}
}

/* A restored engine may have ended before this word; pids of before the last `engine 0` are another's. */
static void watch_over(pid_t pid)
{
	engine = pid;
	for (unsigned i = 0; pid && i < reaped_count && i < REMEMBERED; i++)
		if (reaped[i].pid == pid)
			end_as(reaped[i].status);
	if (!pid) {
		port = 0;
		reaped_count = 0;
		tell_fields("idle", 0, 0);
	}
}

/* Whether the engine would notice the signal if it were pid 1: it has a handler for it, or waits for it with the signal blocked. */
static int takes(int number)
{
	char path[64], line[256];
	unsigned long long mask, taken = 0;

	snprintf(path, sizeof(path), "/proc/%d/status", (int)engine);
	FILE *status = fopen(path, "re");
	if (!status)
		return 1; /* it has ended, or cannot be seen: pass it on */
	while (fgets(line, sizeof(line), status))
		if (sscanf(line, "SigCgt: %llx", &mask) == 1 || sscanf(line, "SigBlk: %llx", &mask) == 1)
			taken |= mask;
	fclose(status);
	return taken >> (number - 1) & 1;
}

/* Whether a client is connected to the engine, or has not got all of an answer yet. */
static int connected_in(const char *path)
{
	char line[512];
	unsigned local, state;
	int found = 0;
	FILE *sockets = fopen(path, "re");

	if (!sockets)
		return 0;
	while (!found && fgets(line, sizeof(line), sockets))
		/* established, FIN_WAIT1 (the engine has closed, its last bytes are on their way), CLOSE_WAIT (the client has asked all) */
		found = sscanf(line, " %*d: %*[0-9A-Fa-f]:%x %*[0-9A-Fa-f]:%*x %x", &local, &state) == 2 && local == port &&
			(state == 0x01 || state == 0x04 || state == 0x08);
	fclose(sockets);
	return found;
}

static int answers(void)
{
	return connected_in("/proc/net/tcp") || connected_in("/proc/net/tcp6");
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static int stops(int number)
{
	return number == SIGTERM || number == SIGINT || number == SIGQUIT || number == SIGRTMIN + 3;
}

static void end_engine(void)
{
	told_to_end = 1;
	kill(engine, asked);
	asked = 0;
}

static void look_at_connections(void)
{
	quiet = answers() ? 0 : quiet + 1;
	if (quiet >= QUIET_LOOKS)
		end_engine();
	else if (deadline >= 0 && now() > deadline && takes(asked))
		end_engine(); /* so that it may say goodbye; one that does not hear it goes on until it is killed */
}

static void pass_on(int number)
{
	if (engine && port && !told_to_end && stops(number)) {
		if (!asked) {
			asked = number;
			quiet = 0;
			if (deadline < 0)
				deadline = now() + patience;
			tell_fields("asked", number, 0);
			look_at_connections();
		}
	} else if (engine) {
		if (!port || stops(number) || takes(number))
			kill(engine, number);
	} else if (number == SIGTERM || number == SIGINT || number == SIGQUIT || number == SIGHUP)
		_exit(128 + number);
}

/* The fields after the word, as a list ended by NULL. NULL: the message is broken. */
static char **fields(char *message, size_t size, int *count)
{
	char *end = message + size, *at = message + strlen(message) + 1;
	int n = 0;
	char **list = calloc(size + 1, sizeof(char *));
	while (list && at < end) {
		list[n++] = at;
		at += strlen(at) + 1;
	}
	*count = n;
	return list;
}

static void obey(char *message, size_t size)
{
	int n;
	message[size] = 0;
	char **list = fields(message, size, &n);
	if (!strcmp(message, "cold"))
		become(own);
	if (!list || n < 1) {
		errno = EBADMSG;
		tell_error(message);
	} else if (!strcmp(message, "engine") && atoi(list[0]) >= 0 && atoi(list[0]) != 1) { /* signals to others would go to all */
		reap();
		watch_over(atoi(list[0]));
		if (n >= 3) {
			port = atoi(list[1]);
			patience = atoi(list[2]) / 1e3;
		}
	} else if (!strcmp(message, "until")) {
		deadline = now() + atoi(list[0]) / 1e3;
	} else if (!strcmp(message, "exit")) {
		_exit(atoi(list[0]));
	} else if (!strcmp(message, "start") && atoi(list[0]) >= 0 && atoi(list[0]) < n - 1) {
		char **command = list + 1;
		for (int left = atoi(list[0]); left; left--)
			putenv(strdup(*command++));
		start(command);
	} else {
		errno = EBADMSG;
		tell_error(message);
	}
	free(list);
}

static void greet(void)
{
	char *message = malloc(MAX_MESSAGE);
	size_t n = 0;
	if (!message)
		return;
	n += snprintf(message, MAX_MESSAGE, "hello%c%s%c%d%c%d%c", 0, engine ? "engine" : "waiting", 0, (int)engine, 0, own_count, 0);
	for (int i = 0; i < own_count; i++) {
		size_t length = strlen(own[i]) + 1;
		if (n + length > MAX_MESSAGE) {
			say("the command is too long for the agent; starting it as it is");
			become(own);
		}
		memcpy(message + n, own[i], length);
		n += length;
	}
	if (send(agent, message, n, MSG_NOSIGNAL) < 0) {
		close(agent);
		agent = -1;
	}
	free(message);
	if (asked)
		tell_fields("asked", asked, 0);
}

static void call_agent(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int size = 2 * MAX_MESSAGE;

	strcpy(address.sun_path, socket_path);
	/* Not to be blocked by: an agent that stands still takes no callers once its queue is full, and signals have to be passed on. */
	agent = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (agent >= 0 && connect(agent, (struct sockaddr *)&address, sizeof(address)) < 0) {
		close(agent);
		agent = -1;
	}
	if (agent < 0)
		return;
	setsockopt(agent, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	greet();
}

static int beside_this_program(void)
{
	char program[sizeof(socket_path)];
	ssize_t n = readlink("/proc/self/exe", program, sizeof(program) - 1);
	if (n < 0)
		return -1;
	program[n] = 0;
	n = snprintf(socket_path, sizeof(socket_path), "%s/" SOCKET_NAME, dirname(program));
	return n < (ssize_t)sizeof(socket_path) ? 0 : -1;
}

static void hear(int signals)
{
	struct signalfd_siginfo signal;
	while (read(signals, &signal, sizeof(signal)) > 0)
		if (signal.ssi_signo != SIGCHLD)
			pass_on(signal.ssi_signo);
	reap(); /* after the signals were read: one that tells of a child's end comes once */
}

int main(int argc, char **argv)
{
	static char message[MAX_MESSAGE + 1];
	sigset_t all;
	double alone = now();

	if (argc < 3 || strcmp(argv[1], "--")) {
		say("usage: zerowake-placeholder -- COMMAND ARG...");
		return 126;
	}
	own = argv + 2;
	own_count = argc - 2;
	if (beside_this_program() < 0) {
		say("cannot tell where it lies; is /proc mounted?");
		return 126;
	}
	sigfillset(&all);
	sigdelset(&all, SIGSEGV);
	sigdelset(&all, SIGBUS);
	sigprocmask(SIG_SETMASK, &all, NULL);
	int signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0) {
		say("no signalfd");
		return 126;
	}
	for (;;) {
		if (agent < 0)
			call_agent();
		if (agent < 0 && !engine && now() - alone > PATIENCE_SECONDS) {
			say("no restore agent answers on this node; starting without it");
			become(own);
		}
		struct pollfd watched[2] = { { signals, POLLIN, 0 }, { agent, POLLIN, 0 } };
		poll(watched, 2, asked ? LOOK_MILLISECONDS : agent < 0 ? RETRY_MILLISECONDS : -1);
		if (!engine)
			hear(signals); /* before it becomes something else */
		if (agent >= 0 && watched[1].revents) {
			ssize_t n = recv(agent, message, MAX_MESSAGE, MSG_DONTWAIT | MSG_TRUNC);
			if (n > MAX_MESSAGE) {
				errno = EMSGSIZE; /* half of a command is another one */
				tell_error("a message");
			} else if (n > 0) {
				obey(message, n);
			} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
				close(agent);
				agent = -1;
				alone = now();
			}
		}
		hear(signals); /* after the agent, who may just have said how they are to be taken */
		if (asked)
			look_at_connections();
	}
}
