/* Any program that `zerowake snapshot create --renew` starts, preloaded: OpenSSL's random state is made anew in each replica.
 *
 * renewal.py says why, and what the agent writes. A thread waits in `open` of the control directory's door, without a descriptor; when the
 * process was restored, it adds what the kernel gives it to each OpenSSL that is loaded, be it a library or within the program (Node).
 * RAND_add reseeds the root of OpenSSL's generators, at once and in any thread, and those of the threads see that before they next draw.
 * Left to itself OpenSSL 3.0 asked the kernel again within a day, and not within an hour, which is too late.
 *
 * Rejected: taking the place of RAND_bytes and its like, which sees no call within libcrypto (TLS); a handler for a signal, in which nothing
 * of OpenSSL may be called.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum { LIBRARIES = 8, STACK_BYTES = 256 << 10 }; /* a restored libcrypto that was never used reads its configuration first */

typedef void add_function(const void *, int, double);

struct found {
	int count;
	char names[LIBRARIES][PATH_MAX];
};

static char folder[PATH_MAX];

static int path_of(char *path, const char *name)
{
	return snprintf(path, PATH_MAX, "%s/%s", folder, name) < PATH_MAX;
}

static int is_there(const char *name)
{
	char path[PATH_MAX];
	return path_of(path, name) && access(path, F_OK) == 0;
}

/* That this process will see to it, or, once it was restored, that it has. One that may not write there is not waited for. */
static void announce(void)
{
	char name[64], fresh[PATH_MAX], path[PATH_MAX];
	snprintf(name, sizeof(name), ".renews-%d-openssl", (int)getpid());
	if (!path_of(fresh, name) || !path_of(path, name + 1))
		return;
	int file = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
	if (file < 0)
		return;
	close(file);
	if (rename(fresh, path) < 0)
		unlink(fresh);
}

static int note(struct dl_phdr_info *object, size_t size, void *to)
{
	(void)size;
	struct found *found = to;
	if (found->count < LIBRARIES && strstr(object->dlpi_name, "libcrypto") && strlen(object->dlpi_name) < PATH_MAX)
		strcpy(found->names[found->count++], object->dlpi_name);
	return 0;
}

static void add_to(void *library)
{
	add_function *add;
	*(void **)&add = dlsym(library, "RAND_add");
	unsigned char seed[64];
	if (add && getrandom(seed, sizeof(seed), 0) == (ssize_t)sizeof(seed))
		add(seed, sizeof(seed), sizeof(seed));
	explicit_bzero(seed, sizeof(seed));
}

static void renew(void)
{
	static struct found found;
	add_to(RTLD_DEFAULT);
	dl_iterate_phdr(note, &found); /* it holds a lock of the loader: nothing is loaded within */
	for (int i = 0; i < found.count; i++) {
		void *library = dlopen(found.names[i], RTLD_LAZY | RTLD_NOLOAD);
		if (library) {
			add_to(library);
			dlclose(library);
		}
	}
}

static void *listen_for_restore(void *nothing)
{
	char door[PATH_MAX];
	if (!path_of(door, "answer.fifo"))
		return nothing;
	announce();
	while (!is_there("restore-complete")) {
		if (is_there("snapshot-complete"))
			return nothing; /* it is the one that was dumped, and goes on as itself */
		int file = open(door, O_RDONLY | O_CLOEXEC);
		if (file >= 0)
			close(file);
		else if (errno != EINTR)
			return nothing; /* the place is being taken down */
	}
	renew();
	announce();
	return nothing;
}

/* In this process, and in each that it forks. Signals are the program's own threads'. */
static void begin(void)
{
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;
	if (pthread_attr_init(&attributes) != 0)
		return;
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_create(&thread, &attributes, listen_for_restore, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
}

__attribute__((constructor)) static void start(void)
{
	const char *named = getenv("SNAPSHOT_CONTROL_DIR");
	if (!named || strlen(named) >= sizeof(folder))
		return;
	strcpy(folder, named);
	if (!is_there("answer.fifo"))
		return;
	pthread_atfork(NULL, NULL, begin);
	begin();
}
