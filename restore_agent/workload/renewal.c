/* Any program that `zerowake snapshot create --renew` starts, preloaded: the random state of OpenSSL and of C's library is made anew in
 * each replica.
 *
 * renewal.py says why, and what the agent writes. A thread waits in `open` of the control directory's door, without a descriptor; when the
 * process was restored, it adds what the kernel gives it to each OpenSSL that is loaded, be it a library or within the program (Node).
 * RAND_add reseeds the root of OpenSSL's generators, at once and in any thread, and those of the threads see that before they next draw.
 * Left to itself OpenSSL 3.0 asked the kernel again within a day, and not within an hour, which is too late.
 *
 * The same thread seeds `random`, which is `rand`, too. glibc locks it: whoever was within it at the dump goes on and unlocks it, since
 * this is a thread and no signal's handler. `drand48` and its like have no lock, and a program calls them from one thread at a time: a draw
 * that is under way would write what follows the old state over a new one from here. So this library takes their place, and whoever next
 * calls one of them seeds them first. States that a program keeps itself (random_r, rand_r, erand48) are its own to renew.
 *
 * A process that begins after the restore, or is forked once all was renewed, is left alone: it repeats nothing, and a number by which it
 * seeds itself shall not be overtaken. The kernel is asked by its call, not through glibc, which since 2.41 keeps state of that in memory.
 *
 * Rejected: taking the place of RAND_bytes and its like, which sees no call within libcrypto (TLS); a handler for a signal, in which
 * nothing of OpenSSL may be called.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LIBRARIES = 8, STACK_BYTES = 256 << 10 }; /* a restored libcrypto that was never used reads its configuration first */

typedef void add_function(const void *, int, double);

struct found {
	int count;
	char names[LIBRARIES][PATH_MAX];
};

static char folder[PATH_MAX];
static int keeps_seeds;     /* somebody chose them: ZEROWAKE_KEEP_SEEDS */
static atomic_int is_new;   /* nothing here is as in other replicas, nor in what is forked from now on */
static atomic_int is_due48; /* drand48 and its like are to be seeded before their next draw */

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

static int from_kernel(void *bytes, size_t count)
{
	return syscall(SYS_getrandom, bytes, count, 0) == (long)count;
}

static void add_to(void *library)
{
	add_function *add;
	*(void **)&add = dlsym(library, "RAND_add");
	unsigned char seed[64];
	if (add && from_kernel(seed, sizeof(seed)))
		add(seed, sizeof(seed), sizeof(seed));
	explicit_bzero(seed, sizeof(seed));
}

static void renew(void)
{
	static struct found found;
	found.count = 0; /* the process that forked this one may have begun */
	add_to(RTLD_DEFAULT);
	dl_iterate_phdr(note, &found); /* it holds a lock of the loader: nothing is loaded within */
	for (int i = 0; i < found.count; i++) {
		void *library = dlopen(found.names[i], RTLD_LAZY | RTLD_NOLOAD);
		if (library) {
			add_to(library);
			dlclose(library);
		}
	}
	unsigned seed;
	if (!keeps_seeds && from_kernel(&seed, sizeof(seed))) {
		srandom(seed);
		atomic_store(&is_due48, 1);
	}
	atomic_store(&is_new, 1);
}

/* The C library's function of this name, which the one here takes the place of. */
#define OWN(name)                                             \
	({                                                    \
		static _Atomic(void *) own;                   \
		if (!own)                                     \
			own = dlsym(RTLD_NEXT, #name);        \
		(__typeof__(&name))own;                       \
	})

/* A multiplier that lcong48 was given does not outlive it. */
static void seed48_if_due(void)
{
	unsigned short seed[3];
	if (atomic_load_explicit(&is_due48, memory_order_relaxed) && atomic_exchange(&is_due48, 0) && from_kernel(seed, sizeof(seed)))
		OWN(seed48)(seed);
}

double drand48(void)
{
	seed48_if_due();
	return OWN(drand48)();
}

long lrand48(void)
{
	seed48_if_due();
	return OWN(lrand48)();
}

long mrand48(void)
{
	seed48_if_due();
	return OWN(mrand48)();
}

/* Those that seed, as well: what the program chooses stays, and the state that seed48 returns may be brought back. */
void srand48(long seed)
{
	seed48_if_due();
	OWN(srand48)(seed);
}

unsigned short *seed48(unsigned short seed[3])
{
	seed48_if_due();
	return OWN(seed48)(seed);
}

void lcong48(unsigned short parameters[7])
{
	seed48_if_due();
	OWN(lcong48)(parameters);
}

/* It was restored; its wake may still be to come. */
static int is_back(void)
{
	return is_there("restore-complete") || is_there("renewal-requested");
}

static void *listen_for_restore(void *nothing)
{
	char door[PATH_MAX];
	if (!path_of(door, "answer.fifo"))
		return nothing;
	announce();
	while (!is_back()) {
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
	if (atomic_load(&is_new))
		return;
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
	if (!is_there("answer.fifo") || is_back())
		return;
	const char *kept = getenv("ZEROWAKE_KEEP_SEEDS");
	keeps_seeds = kept && *kept;
	pthread_atfork(NULL, NULL, begin);
	begin();
}
