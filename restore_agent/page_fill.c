/*
 * Copies pages into processes that CRIU has restored and holds, with several threads. CRIU fills memory with one; page faults and
 * the copy are what a restore's time is made of, and both scale with threads.
 *
 * Pieces never cross a 2 MiB boundary of the target, so that no two threads fault the same huge page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/uio.h>

/* One run of pages: `length` bytes at `offset` of the arena belong at `address` of process `pid`. */
struct piece {
	uint64_t pid;
	uint64_t address;
	uint64_t offset;
	uint64_t length;
};

struct fill {
	const char *arena;
	const struct piece *pieces;
	size_t count;
	atomic_size_t next;
	atomic_int error;
	_Atomic uint64_t failed_address;
};

/* Pieces are small where zero pages were left out: many go into one call, up to this many bytes. */
#define BATCH 128
#define BATCH_BYTES (2u << 20)

static void *work(void *argument)
{
	struct fill *fill = argument;
	struct iovec local[BATCH], remote[BATCH];

	while (!atomic_load_explicit(&fill->error, memory_order_relaxed)) {
		size_t first = atomic_load(&fill->next), last, n, bytes;
		do {
			if (first >= fill->count)
				return NULL;
			last = first;
			bytes = 0;
			do {
				bytes += fill->pieces[last].length;
				last++;
			} while (last < fill->count && last - first < BATCH && fill->pieces[last].pid == fill->pieces[first].pid &&
				 bytes + fill->pieces[last].length <= BATCH_BYTES);
		} while (!atomic_compare_exchange_weak(&fill->next, &first, last));

		for (n = 0; n < last - first; n++) {
			const struct piece *piece = &fill->pieces[first + n];
			local[n] = (struct iovec){ (char *)fill->arena + piece->offset, piece->length };
			remote[n] = (struct iovec){ (void *)piece->address, piece->length };
		}
		ssize_t done = process_vm_writev(fill->pieces[first].pid, local, n, remote, n, 0);
		if (done == (ssize_t)bytes)
			continue;
		int error = done < 0 ? errno : EFAULT;
		size_t at = first;
		for (size_t left = done < 0 ? 0 : done; at + 1 < last && left >= fill->pieces[at].length; at++)
			left -= fill->pieces[at].length;
		atomic_store(&fill->failed_address, fill->pieces[at].address);
		atomic_store(&fill->error, error);
	}
	return NULL;
}

/* Returns 0, or an errno with the address of the piece that failed. The caller is one of the threads. */
int page_fill(const void *arena, const struct piece *pieces, size_t count, int threads, uint64_t *failed_address)
{
	struct fill fill = { .arena = arena, .pieces = pieces, .count = count };
	pthread_t others[64];
	int started = 0;

	while (started < threads - 1 && started < 64 && !pthread_create(&others[started], NULL, work, &fill))
		started++;
	work(&fill);
	for (int i = 0; i < started; i++)
		pthread_join(others[i], NULL);
	*failed_address = atomic_load(&fill.failed_address);
	return atomic_load(&fill.error);
}
