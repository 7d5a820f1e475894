// Sums and gathers between the ranks of one engine, over memory that each of them has lent from gpumem and all have mapped (all_reduce.py).
//
// Every rank copies what it has into its own memory, says so to the others, waits until they have said so, and reads theirs. What is small
// takes one way instead of three: it is written into the others' memories at once, and each 8 bytes there say of which call they are.
// Nothing of it is a communicator: the addresses are arguments, and they are the same after a restore, so that CUDA graphs which hold such
// a call go on.
//
// Ranks call the same kernels in the same order, on one stream each. A block talks only to the blocks of the same number; the number of the
// call (`calls`, kept in the memory itself) says what a flag means, and which of two halves is used. So nobody has to wait for the others
// at the end: a half is written again two calls later, which begins on a rank when the call between has ended there, which ends when all
// ranks have begun it, which they do when the first has ended. That holds for what others write there, too. The memory is zeros after each
// resume, for all ranks at once.
//
// Written so that NVRTC and a C compiler take it: tests/ run it with threads for a GPU's, and supply what stands behind GPU_ here.

#define MOST_RANKS 8
#define MOST_BLOCKS 64
#define SUM 0         // each rank reads all of the others': the fewest waits
#define SUM_IN_PARTS 1  // each rank sums a part and reads the others' parts: the fewest bytes, between more than two
#define GATHER 2      // all ranks', one behind the other
#define SUM_PUSHED 3  // each rank writes to all others: no more than PUSHED bytes
#define PUSHED 65536
#define BF16 0
#define FP16 1
#define FP32 2

#ifdef __CUDACC_RTC__
#define GPU_KERNEL extern "C" __global__ __launch_bounds__(512)
#define GPU_DEVICE static __device__ __forceinline__
#define GPU_BARRIER() __syncthreads()
typedef unsigned int u32;
typedef unsigned long long u64;
struct vector { u32 word[4]; };

GPU_DEVICE void GPU_say(u32* flag, u32 value)  // what this thread's block has written is there for who sees the flag
{
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

GPU_DEVICE u32 GPU_hear(const u32* flag)
{
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

GPU_DEVICE struct vector GPU_read(const struct vector* from)  // past the first cache, which knows nothing of other GPUs
{
    struct vector value;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                 : "l"(from)
                 : "memory");
    return value;
}

struct line { u64 half[2]; };  // each arrives whole, whichever comes first

GPU_DEVICE void GPU_push(struct line* to, struct line line)
{
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(line.half[0]), "l"(line.half[1]) : "memory");
}

GPU_DEVICE struct line GPU_look(const struct line* at)
{
    struct line line;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(line.half[0]), "=l"(line.half[1]) : "l"(at) : "memory");
    return line;
}

GPU_DEVICE u32 GPU_add(u32* counter) { return atomicAdd(counter, 1); }
GPU_DEVICE float GPU_float(u32 bits) { return __uint_as_float(bits); }
GPU_DEVICE u32 GPU_bits(float value) { return __float_as_uint(value); }

GPU_DEVICE float GPU_from_half(u32 half)
{
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(half));
    return value;
}

GPU_DEVICE u32 GPU_to_half(float value)
{
    u32 half;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(half) : "f"(value));
    return half;
}
#endif

// At the start of each rank's memory.
struct header {
    u32 calls;  // that this rank has ended; its own alone
    u32 ended;  // blocks of this call
    u32 unused[30];
    u32 flags[2][MOST_BLOCKS][MOST_RANKS];  // by the wait of a call, the block, and who says it: the number of the call
};

struct peers {
    unsigned char* at[MOST_RANKS];  // every rank's memory, as this one has mapped it
};

GPU_DEVICE u32 after(u32 call) { return call + 1 ? call + 1 : 2; }  // zeros are nobody's, and the halves go in turn

// patience: how often to look for the others; 0: until they come. Only a first try gives up, to say that it does not work.
GPU_DEVICE void meet(struct peers peers, u32 rank, u32 ranks, u32 which, u32 call, u64 patience)
{
    GPU_BARRIER();
    if (threadIdx.x < ranks) {
        const u32* flag = &((struct header*)peers.at[rank])->flags[which][blockIdx.x][threadIdx.x];
        GPU_say(&((struct header*)peers.at[threadIdx.x])->flags[which][blockIdx.x][rank], call);
        u32 heard = GPU_hear(flag);
        for (u64 looks = 1; heard != call && heard != after(call) && looks != patience; looks++)  // others may be one call further
            heard = GPU_hear(flag);
    }
    GPU_BARRIER();
}

GPU_DEVICE float low(u32 word, u32 kind) { return kind == BF16 ? GPU_float(word << 16) : GPU_from_half(word & 0xffff); }
GPU_DEVICE float high(u32 word, u32 kind) { return kind == BF16 ? GPU_float(word & 0xffff0000) : GPU_from_half(word >> 16); }

GPU_DEVICE u32 rounded(float value, u32 kind)  // to 16 bits, to nearest even
{
    u32 bits = GPU_bits(value);
    if (kind == FP16)
        return GPU_to_half(value);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (bits >> 16) | 0x40;  // it stays no number
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

GPU_DEVICE void add(float* sums, struct vector part, u32 kind)
{
    for (u32 i = 0; i < 4; i++) {
        if (kind == FP32) {
            sums[i] += GPU_float(part.word[i]);
        } else {
            sums[2 * i] += low(part.word[i], kind);
            sums[2 * i + 1] += high(part.word[i], kind);
        }
    }
}

GPU_DEVICE struct vector packed(const float* sums, u32 kind)
{
    struct vector result;
    for (u32 i = 0; i < 4; i++)
        result.word[i] = kind == FP32 ? GPU_bits(sums[i]) : rounded(sums[2 * i], kind) | rounded(sums[2 * i + 1], kind) << 16;
    return result;
}

// Of all ranks, in their order, which is the same on each of them: so are the bits.
GPU_DEVICE struct vector summed(struct peers peers, u32 ranks, u64 offset, u64 index, u32 kind)
{
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (u32 each = 0; each < ranks; each++)
        add(sums, GPU_read((const struct vector*)(peers.at[each] + offset) + index), kind);
    return packed(sums, kind);
}

// Where a rank's vector lies in another's memory, behind its halves: two lines, in each two words of it, and behind each the call.
GPU_DEVICE struct line* lines(unsigned char* memory, u64 half, u32 call, u32 from, u64 index)
{
    return (struct line*)(memory + sizeof(struct header) + 2 * half + ((u64)(call & 1) * MOST_RANKS + from) * 2 * PUSHED) + 2 * index;
}

GPU_DEVICE void push(struct line* to, struct vector vector, u32 call)
{
    for (u32 i = 0; i < 2; i++) {
        struct line line = {{vector.word[2 * i] | (u64)call << 32, vector.word[2 * i + 1] | (u64)call << 32}};
        GPU_push(to + i, line);
    }
}

GPU_DEVICE struct vector pushed(const struct line* from, u32 call, u64 patience)
{
    struct vector vector;
    for (u32 i = 0; i < 2; i++) {
        struct line line = GPU_look(from + i);
        for (u64 looks = 1; (line.half[0] >> 32 != call || line.half[1] >> 32 != call) && looks != patience; looks++)
            line = GPU_look(from + i);
        vector.word[2 * i] = (u32)line.half[0], vector.word[2 * i + 1] = (u32)line.half[1];
    }
    return vector;
}

// in, out: of `count` vectors of 16 bytes; in the out of a GATHER each rank's begin `pitch` vectors behind those of the one before.
// half: bytes of each half of a rank's memory.
GPU_KERNEL void collective(struct peers peers, u32 rank, u32 ranks, const struct vector* in, struct vector* out, u64 count, u64 pitch, u64 half,
                           u32 mode, u32 kind, u64 patience)
{
    struct header* own = (struct header*)peers.at[rank];
    u32 call = after(own->calls);
    u64 offset = sizeof(struct header) + (call & 1) * half;
    struct vector* staged = (struct vector*)(peers.at[rank] + offset);
    u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x, step = (u64)gridDim.x * blockDim.x;

    if (mode == SUM_PUSHED) {
        for (u64 i = first; i < count; i += step)
            for (u32 each = 0; each < ranks; each++)
                if (each != rank)
                    push(lines(peers.at[each], half, call, rank, i), in[i], call);
        for (u64 i = first; i < count; i += step) {
            float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            for (u32 each = 0; each < ranks; each++)
                add(sums, each == rank ? in[i] : pushed(lines(peers.at[rank], half, call, each, i), call, patience), kind);
            out[i] = packed(sums, kind);
        }
    } else {
        for (u64 i = first; i < count; i += step)
            staged[i] = in[i];
        meet(peers, rank, ranks, 0, call, patience);
    }
    if (mode == SUM) {
        for (u64 i = first; i < count; i += step)
            out[i] = summed(peers, ranks, offset, i, kind);
    } else if (mode == GATHER) {
        for (u32 each = 0; each < ranks; each++)
            for (u64 i = first; i < count; i += step)
                out[each * pitch + i] = GPU_read((const struct vector*)(peers.at[each] + offset) + i);
    } else if (mode == SUM_IN_PARTS) {
        // Of each block's pieces every rank sums those whose turn is its own, in place: nobody else reads these.
        u64 i = first;
        for (u64 piece = 0; i < count; i += step, piece++)
            if (piece % ranks == rank)
                staged[i] = summed(peers, ranks, offset, i, kind);
        meet(peers, rank, ranks, 1, call, patience);
        i = first;
        for (u64 piece = 0; i < count; i += step, piece++)
            out[i] = GPU_read((const struct vector*)(peers.at[piece % ranks] + offset) + i);
    }

    GPU_BARRIER();
    if (threadIdx.x == 0 && GPU_add(&own->ended) == gridDim.x - 1) {  // the last block of this rank's
        own->ended = 0;
        own->calls = call;  // for this rank's next call alone, which begins when this one has ended
    }
}
