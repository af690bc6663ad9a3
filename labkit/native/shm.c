/* Collectives between ranks of one host through shared memory, for messages so small that a socket's latency is all they cost.

   The memory holds, for each rank, a control line and two slots. An operation copies this rank's part into one of its slots,
   publishes it by counting `phase` up, waits until all peers have done the same, and reads what it needs from their slots.
   Slots take turns: whoever writes a slot again has since waited once for everybody, so everybody has finished reading it.
   Longer messages go in chunks of a slot. Sums are taken in rank order, in at least float32, so all ranks get the same bits.

   Publishing is a release, seeing it an acquire, in C11's terms: right on Arm as on x86. Waiting spins, then
   gives up the core, then sleeps: who has slept is let back in first on a busy core, who has spun is not. It knows nothing of Python or torch.

   Every operation returns 0, r + 1 if rank r did not come in time, or -(r + 1) if rank r is in another operation. */

#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

enum { LINE = 128, MAX_RANKS = 64, BLOCK = 1024 };
enum { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BROADCAST }; /* also in shm.py */

typedef struct {
    _Alignas(LINE) _Atomic uint64_t phase; /* how often this rank has published */
    uint64_t tag[2];                       /* the operation whose data stands in each slot */
    uint64_t rounds[2];                    /* of an all-to-all: how many chunks this rank has to send */
} Control;

typedef struct {
    char *memory;
    int n, me, turn;
    size_t slot; /* bytes */
    uint64_t phase;
    double timeout; /* seconds */
    int spins, yields; /* looks at a flag before the core is given up, and before sleeping */
} Group;

static Control *control(const Group *g, int rank) { return (Control *)g->memory + rank; }

static char *slot(const Group *g, int rank) {
    return g->memory + g->n * sizeof(Control) + (2 * (size_t)rank + g->turn) * g->slot;
}

size_t labkit_size(int n, size_t slot_bytes) { return n * (sizeof(Control) + 2 * slot_bytes); }

/* `fd` is a file of labkit_size() zero bytes; slot_bytes a multiple of 64 n. NULL if it can't be mapped. */
Group *labkit_open(int fd, int n, int me, size_t slot_bytes, double timeout, int spins, int yields) {
    if (n > MAX_RANKS) return NULL;
    void *memory = mmap(NULL, labkit_size(n, slot_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) return NULL;
    Group *g = calloc(1, sizeof *g);
    if (g) *g = (Group){memory, n, me, 0, slot_bytes, 0, timeout, spins, yields};
    prctl(PR_SET_TIMERSLACK, 1); /* ns: sleep no longer than asked for */
    return g;
}

/* What rank `rank` is in, or was in last: the tag of its slot. */
uint64_t labkit_tag(const Group *g, int rank) { return control(g, rank)->tag[g->turn]; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void publish(Group *g) { atomic_store_explicit(&control(g, g->me)->phase, ++g->phase, memory_order_release); }

static int here(const Group *g, int rank) {
    return atomic_load_explicit(&control(g, rank)->phase, memory_order_acquire) >= g->phase;
}

static int wait_for(const Group *g, int rank) {
    for (int i = 0; i < g->spins; i++, relax())
        if (here(g, rank)) return 0;
    for (int i = 0; i < g->yields; i++, sched_yield())
        if (here(g, rank)) return 0;
    double began = now();
    while (!here(g, rank)) {
        if (now() - began > g->timeout) return rank + 1;
        nanosleep(&(struct timespec){0, 20000}, NULL);
    }
    return 0;
}

static int wait_for_all(const Group *g) {
    for (int rank = 0; rank < g->n; rank++) {
        int late = rank == g->me ? 0 : wait_for(g, rank);
        if (late) return late;
    }
    return 0;
}

/* Waits for all, and for all to be in the same operation. */
static int meet(Group *g) {
    int late = wait_for_all(g);
    for (int rank = 0; rank < g->n && !late; rank++)
        if (labkit_tag(g, rank) != labkit_tag(g, g->me)) late = -(rank + 1);
    return late;
}

/* Takes the other slot for what comes next. */
static char *next_slot(Group *g, int op, int dtype, uint64_t bytes) {
    g->turn ^= 1;
    control(g, g->me)->tag[g->turn] = (uint64_t)op << 56 | (uint64_t)dtype << 48 | (bytes & 0xffffffffffff);
    return slot(g, g->me);
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* -- sums ----------------------------------------------------------------------------------------------------------- */

static float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t to_bf16(float f) { /* rounds to nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define SAME(x) (x)
#define SUM(name, type, wide, load, store)                                                            \
    static void name(void *out, char *const *parts, int n, size_t count) {                            \
        wide total[BLOCK];                                                                            \
        for (size_t at = 0; at < count; at += BLOCK) {                                                \
            size_t m = smaller(BLOCK, count - at);                                                    \
            const type *x = (const type *)parts[0] + at;                                              \
            for (size_t i = 0; i < m; i++) total[i] = load(x[i]);                                     \
            for (int rank = 1; rank < n; rank++) {                                                    \
                x = (const type *)parts[rank] + at;                                                   \
                for (size_t i = 0; i < m; i++) total[i] += load(x[i]);                                \
            }                                                                                         \
            for (size_t i = 0; i < m; i++) ((type *)out)[at + i] = store(total[i]);                   \
        }                                                                                             \
    }
SUM(sum_float, float, float, SAME, SAME)
SUM(sum_double, double, double, SAME, SAME)
SUM(sum_bf16, uint16_t, float, from_bf16, to_bf16)
SUM(sum_int32, int32_t, int32_t, SAME, SAME)
SUM(sum_int64, int64_t, int64_t, SAME, SAME)

static const struct {
    size_t width;
    void (*sum)(void *, char *const *, int, size_t);
} DTYPES[] = {{4, sum_float}, {8, sum_double}, {2, sum_bf16}, {4, sum_int32}, {8, sum_int64}}; /* order: shm.py */

static void sum_slots(const Group *g, void *out, size_t offset, size_t count, int dtype) {
    char *parts[MAX_RANKS];
    for (int rank = 0; rank < g->n; rank++) parts[rank] = slot(g, rank) + offset;
    DTYPES[dtype].sum(out, parts, g->n, count);
}

/* -- operations ----------------------------------------------------------------------------------------------------- */

/* In place. Up to `one_shot` bytes every rank adds up everything; above, each adds up its share, and they exchange shares. */
int labkit_all_reduce(Group *g, char *data, size_t count, int dtype, size_t one_shot) {
    size_t width = DTYPES[dtype].width, bytes = count * width;
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t m = smaller(g->slot, bytes - at) / width;
        char *mine = next_slot(g, ALL_REDUCE, dtype, bytes);
        memcpy(mine, data + at, m * width);
        publish(g);
        int late = meet(g);
        if (late) return late;
        if (m * width <= one_shot) {
            sum_slots(g, data + at, 0, m, dtype);
            continue;
        }
        size_t share = (m + g->n - 1) / g->n; /* of each rank; the last ones may have less, or nothing */
        size_t start = smaller(g->me * share, m), stop = smaller(start + share, m);
        sum_slots(g, mine + start * width, start * width, stop - start, dtype); /* nobody else reads there */
        publish(g);
        if ((late = wait_for_all(g))) return late;
        for (int rank = 0; rank < g->n; rank++) {
            start = smaller(rank * share, m), stop = smaller(start + share, m);
            memcpy(data + at + start * width, slot(g, rank) + start * width, (stop - start) * width);
        }
    }
    return 0;
}

/* `in` has `bytes`, `out` n times as many. */
int labkit_all_gather(Group *g, const char *in, char *out, size_t bytes) {
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t m = smaller(g->slot, bytes - at);
        memcpy(next_slot(g, ALL_GATHER, 0, bytes), in + at, m);
        publish(g);
        int late = meet(g);
        if (late) return late;
        for (int rank = 0; rank < g->n; rank++) memcpy(out + rank * bytes + at, slot(g, rank), m);
    }
    return 0;
}

/* `in` has n times `count` elements, `out` has `count`. */
int labkit_reduce_scatter(Group *g, const char *in, char *out, size_t count, int dtype) {
    size_t width = DTYPES[dtype].width, bytes = count * width, room = g->slot / g->n;
    for (size_t at = 0; at < bytes; at += room) {
        size_t m = smaller(room, bytes - at);
        char *mine = next_slot(g, REDUCE_SCATTER, dtype, bytes);
        for (int rank = 0; rank < g->n; rank++) memcpy(mine + rank * room, in + rank * bytes + at, m);
        publish(g);
        int late = meet(g);
        if (late) return late;
        sum_slots(g, out + at, g->me * room, m / width, dtype);
    }
    return 0;
}

/* send[r] bytes of `in` go to rank r, recv[r] bytes come from it, both in rank order. Each pair's part of a slot begins with
   how many bytes the sender means, so that a receiver that expects another number says so instead of reading past it. */
int labkit_all_to_all(Group *g, const char *in, char *out, const int64_t *send, const int64_t *recv, uint64_t row_bytes) {
    size_t room = g->slot / g->n - 64;
    uint64_t rounds = 1;
    const char *kept = in; /* what stays with this rank goes from one tensor to the other */
    char *here = out;
    for (int rank = 0; rank < g->me; rank++) kept += send[rank], here += recv[rank];
    if (send[g->me] != recv[g->me]) return -(g->me + 1);
    memcpy(here, kept, send[g->me]);
    for (int rank = 0; rank < g->n; rank++)
        if (rank != g->me && (send[rank] + room - 1) / room > rounds) rounds = (send[rank] + room - 1) / room;
    for (uint64_t round = 0, all = rounds; round < all; round++) {
        size_t at = round * room;
        char *mine = next_slot(g, ALL_TO_ALL, 0, row_bytes);
        const char *from = in;
        for (int rank = 0; rank < g->n; from += send[rank++]) {
            char *part = mine + rank * (room + 64);
            if (rank == g->me) continue;
            memcpy(part, &send[rank], 8);
            if (at < (size_t)send[rank]) memcpy(part + 64, from + at, smaller(room, send[rank] - at));
        }
        control(g, g->me)->rounds[g->turn] = rounds;
        publish(g);
        int late = meet(g);
        if (late) return late;
        char *to = out;
        for (int rank = 0; rank < g->n; to += recv[rank++]) {
            const char *part = slot(g, rank) + g->me * (room + 64);
            if (rank == g->me) continue;
            if (memcmp(part, &recv[rank], 8)) return -(rank + 1);
            if (at < (size_t)recv[rank]) memcpy(to + at, part + 64, smaller(room, recv[rank] - at));
            uint64_t theirs = control(g, rank)->rounds[g->turn];
            if (theirs > all) all = theirs;
        }
    }
    return 0;
}

/* `bytes` of the source's `data`, into everybody's. */
int labkit_broadcast(Group *g, char *data, size_t bytes, int source) {
    for (size_t at = 0; at < bytes; at += g->slot) {
        size_t m = smaller(g->slot, bytes - at);
        char *mine = next_slot(g, BROADCAST, 0, bytes);
        if (g->me == source) memcpy(mine, data + at, m);
        publish(g);
        int late = meet(g);
        if (late) return late;
        if (g->me != source) memcpy(data + at, slot(g, source), m);
    }
    return 0;
}
