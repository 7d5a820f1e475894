/*
 * The loops over pages, outside Python: pages copied into processes that CRIU has restored and holds, by several threads; pages of
 * zeros found. CRIU fills memory with one thread; page faults and the copy are what a restore's time is made of, and both scale.
 *
 * Pieces never cross a 2 MiB boundary of the target, so that no two threads fault the same huge page, nor the end of a chunk, so that a
 * chunk can be copied as soon as it has been read. Rejected: /proc/PID/mem, which also writes to read-only mappings: it takes a lock for each
 * page, so that more threads gain nothing, and at 1.2 GB/s it is slower than CRIU, to which those few MB are left.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#define PAGE 4096u
#define HUGE_PAGE (2u << 20)

/* Pages that follow each other: `length` bytes of process `pid` at `address`. The bytes of all runs follow each other in the arena. */
struct run {
	uint64_t pid; /* in the image */
	uint64_t address;
	uint64_t length;
};

/* What one thread copies at a time: `length` bytes at `offset` of the arena belong at `address`. */
struct piece {
	uint64_t pid;
	uint64_t address;
	uint64_t offset;
	uint64_t length;
};

struct process {
	uint64_t pid; /* in the image */
	uint64_t host;
};

/*
 * Joins runs where they touch (CRIU ends one every 256 pages) and cuts them into pieces. `ends[i]` is where chunk i ends in the arena;
 * `lasts[i]` becomes the number of pieces up to there. Returns how many pieces there are; with no `pieces` it only counts.
 */
size_t page_pieces(const struct run *runs, size_t run_count, const uint64_t *ends, size_t *lasts, struct piece *pieces)
{
	size_t count = 0, chunk = 0;
	struct piece last = { 0 };
	uint64_t offset = 0;

	for (size_t i = 0; i < run_count; i++) {
		uint64_t at = runs[i].address, end = at + runs[i].length;
		while (at < end) {
			uint64_t n = HUGE_PAGE - at % HUGE_PAGE, fits = ends[chunk] - offset;
			if (n > end - at)
				n = end - at;
			if (n > fits)
				n = fits;
			int joins = count && last.pid == runs[i].pid && last.address + last.length == at && at % HUGE_PAGE &&
				    (!chunk || offset != ends[chunk - 1]);
			if (joins) {
				last.length += n;
			} else {
				last = (struct piece){ runs[i].pid, at, offset, n };
				count++;
			}
			if (pieces)
				pieces[count - 1] = last;
			at += n;
			offset += n;
			if (offset == ends[chunk]) {
				if (lasts)
					lasts[chunk] = count;
				chunk++;
			}
		}
	}
	return count;
}

struct fill {
	const char *arena;
	const struct piece *pieces;
	size_t count;
	const struct process *processes;
	size_t process_count;
	const _Atomic int *stop;
	atomic_size_t next;
	atomic_int error;
	uint64_t failed_address; /* where that was: written by the thread whose error it is, read when all have ended */
};

/* Pieces are small where zero pages were left out: many go into one call, up to this many bytes. */
#define BATCH 128
#define BATCH_BYTES HUGE_PAGE

static void fail(struct fill *fill, int error, uint64_t address)
{
	int none = 0;
	if (atomic_compare_exchange_strong(&fill->error, &none, error))
		fill->failed_address = address;
}

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

		uint64_t host = 0;
		for (n = 0; n < fill->process_count; n++)
			if (fill->processes[n].pid == fill->pieces[first].pid)
				host = fill->processes[n].host;
		for (n = 0; n < last - first; n++) {
			const struct piece *piece = &fill->pieces[first + n];
			local[n] = (struct iovec){ (char *)fill->arena + piece->offset, piece->length };
			remote[n] = (struct iovec){ (void *)piece->address, piece->length };
		}
		if (atomic_load_explicit(fill->stop, memory_order_relaxed)) {
			fail(fill, ECANCELED, fill->pieces[first].address);
			return NULL;
		}
		ssize_t done = process_vm_writev(host, local, n, remote, n, 0);
		if (done == (ssize_t)bytes)
			continue;
		int error = done < 0 ? errno : EFAULT;
		size_t at = first;
		for (size_t left = done < 0 ? 0 : done; at + 1 < last && left >= fill->pieces[at].length; at++)
			left -= fill->pieces[at].length;
		fail(fill, error, fill->pieces[at].address);
	}
	return NULL;
}

/*
 * Returns 0, or an errno with the address of the piece that failed. The caller is one of the threads. `stop` may be set meanwhile: then
 * nothing more is written once this has returned.
 */
int page_fill(const void *arena, const struct piece *pieces, size_t count, const struct process *processes, size_t process_count,
	      int threads, const _Atomic int *stop, uint64_t *failed_address)
{
	struct fill fill = {
		.arena = arena,
		.pieces = pieces,
		.count = count,
		.processes = processes,
		.process_count = process_count,
		.stop = stop,
	};
	pthread_t others[64];
	int started = 0;

	while (started < threads - 1 && started < 64 && !pthread_create(&others[started], NULL, work, &fill))
		started++;
	work(&fill);
	for (int i = 0; i < started; i++)
		pthread_join(others[i], NULL);
	*failed_address = fill.failed_address;
	return atomic_load(&fill.error);
}

/* Sets zeros[i] to 1 where page i of `data` is all zeros, else to 0. */
void page_zeros(const char *data, size_t pages, unsigned char *zeros)
{
	for (size_t i = 0; i < pages; i++) {
		const char *page = data + i * PAGE;
		/* A page whose first bytes are zeros equals itself moved by as many. */
		zeros[i] = !*(const uint64_t *)page && !memcmp(page, page + sizeof(uint64_t), PAGE - sizeof(uint64_t));
	}
}
