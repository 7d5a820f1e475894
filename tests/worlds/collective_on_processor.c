// all_reduce.cu for a processor: a POSIX thread for each of a GPU's, a barrier for each block, and the host's shared memory for the GPUs'.

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#define GPU_KERNEL static
#define GPU_DEVICE static inline
typedef uint32_t u32;
typedef uint64_t u64;
struct vector { u32 word[4]; };
struct dim { u32 x; };

static _Thread_local struct dim threadIdx, blockIdx, blockDim, gridDim;
static _Thread_local pthread_barrier_t* barrier;

#define GPU_BARRIER() pthread_barrier_wait(barrier)
GPU_DEVICE void GPU_say(u32* flag, u32 value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
GPU_DEVICE u32 GPU_hear(const u32* flag)
{
    u32 value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    sched_yield();  // more threads than cores
    return value;
}
GPU_DEVICE struct vector GPU_read(const struct vector* from) { return *from; }
struct line { u64 half[2]; };
GPU_DEVICE void GPU_push(struct line* to, struct line line)
{
    for (u32 i = 2; i--;)  // the later first
        __atomic_store_n(&to->half[i], line.half[i], __ATOMIC_RELAXED);
}
GPU_DEVICE struct line GPU_look(const struct line* at)
{
    struct line line = {{__atomic_load_n(&at->half[0], __ATOMIC_RELAXED), __atomic_load_n(&at->half[1], __ATOMIC_RELAXED)}};
    sched_yield();
    return line;
}
GPU_DEVICE u32 GPU_add(u32* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }
GPU_DEVICE float GPU_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
GPU_DEVICE u32 GPU_bits(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
GPU_DEVICE float GPU_from_half(u32 half) { uint16_t bits = half; _Float16 value; memcpy(&value, &bits, 2); return (float)value; }
GPU_DEVICE u32 GPU_to_half(float value) { _Float16 half = (_Float16)value; uint16_t bits; memcpy(&bits, &half, 2); return bits; }

#include ALL_REDUCE

struct thread {
    pthread_t id;
    u32 thread, block, threads, blocks;
    pthread_barrier_t* barrier;
    void** arguments;  // as cuLaunchKernel takes them: the address of each
};

static void* run(void* given)
{
    struct thread* own = given;
    void** a = own->arguments;
    threadIdx.x = own->thread, blockIdx.x = own->block, blockDim.x = own->threads, gridDim.x = own->blocks;
    barrier = own->barrier;
    collective(*(struct peers*)a[0], *(u32*)a[1], *(u32*)a[2], *(const struct vector**)a[3], *(struct vector**)a[4], *(u64*)a[5], *(u64*)a[6],
               *(u64*)a[7], *(u32*)a[8], *(u32*)a[9], *(u64*)a[10]);
    return NULL;
}

// One launch. Returns 0 when it has ended.
int launch(u32 blocks, u32 threads, void** arguments)
{
    struct thread all[blocks * threads];
    pthread_barrier_t barriers[blocks];
    for (u32 block = 0; block < blocks; block++) {
        pthread_barrier_init(&barriers[block], NULL, threads);
        for (u32 thread = 0; thread < threads; thread++) {
            struct thread* one = &all[block * threads + thread];
            *one = (struct thread){0, thread, block, threads, blocks, &barriers[block], arguments};
            if (pthread_create(&one->id, NULL, run, one))
                return 1;
        }
    }
    for (u32 i = 0; i < blocks * threads; i++)
        pthread_join(all[i].id, NULL);
    for (u32 block = 0; block < blocks; block++)
        pthread_barrier_destroy(&barriers[block]);
    return 0;
}

u64 header_size(void) { return sizeof(struct header); }
