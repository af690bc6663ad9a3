/* Half a layer in one call, or all layers, sums over ranks included: for the few rows of a decode step, which reads each weight once
   and is as fast as memory, and with AVX2 for many, which are as fast as the processor computes; attention of prompts; and what stands
   between the matrix products, for any number of rows. Where the processor has tile registers, products of many rows and attention of prompts by these (amx.h).

   Everything is summed in float32, of numbers that are stored as float32 (dtype 0) or bfloat16 (dtype 1). What comes out for a row
   is the same bits whatever rows are beside it, but that up to MANY (FEW, where there are tiles) and more may be rounded in different
   ways. Threads are OpenMP's, from the pool that PyTorch's own operations use, so that threads of two pools don't wait for each
   other's cores. It knows nothing of Python. */

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* LANES: of a vector; a tile of a product has as many sums, and the rest of the registers for what is multiplied.
   TALL: rows of x in a tile, at most.
   APART: whether the rows of w in a tile are far apart, so that the processor sees that many streams and fetches ahead in each. As one
   stream, tile after tile, a core of an AMD EPYC (Zen 2) reads SmolLM2's weights at 12 GB/s, as 8 streams at 22.
   KEEP: how long caches had better keep weights (0: they should push nothing out; 2: in the second level). */
#ifdef __AVX512F__
enum { LANES = 16, TALL = 8, APART = 0, KEEP = 2 };
#else
enum { LANES = 8, TALL = 4, APART = 1, KEEP = 0 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

/* -- numbers -------------------------------------------------------------------------------------------------------- */

typedef float f32;

INLINE float wide_f32(f32 x) { return x; }
INLINE f32 narrow_f32(float x) { return x; }

INLINE float wide_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE bf16 narrow_bf16(float f) { /* to nearest, ties to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE vec load_f32(const f32 *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec load_bf16(const bf16 *p) {
#ifdef __AVX512F__ /* GCC 12 makes two halves of it by itself, and puts them together */
    return (vec)(ints)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#else
    return (vec)(ints)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#endif
}

/* e^x to 2e-7 of it: 2^n by the exponent's bits, the rest by its series (|r| <= ln 2 / 2). */
INLINE float power(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return series * scale;
}

enum { MANY = 24 }; /* rows above which `many` is the faster way to a product */
enum { AT_ONCE = 128 }; /* rows up to which one product is of, so that what is made of them stays in caches */

/* How many of `rows` are computed next: parts that are about as large as each other. */
static size_t at_once(size_t rows) { return rows / ((rows + AT_ONCE - 1) / AT_ONCE); }

enum { FEW = 2 }; /* rows up to which a product in vectors is as fast as one by tiles, where the processor has them */

enum { FOR_ROWS, FOR_SUMS, FOR_HEADS, FOR_TILES, FOR_HALVES, USES };

/* Room for `count` numbers: this thread's, one for each use, kept from call to call. */
static float *scratch(int use, size_t count) {
    static _Thread_local float *memory[USES];
    static _Thread_local size_t room[USES];
    if (count > room[use]) {
        free(memory[use]);
        room[use] = (count + 15) / 16 * 16;
        memory[use] = aligned_alloc(64, room[use] * sizeof(float));
    }
    return memory[use];
}

/* Whether of LANES rows of a matrix, `stride` bytes apart, some push each other out of the first-level cache. AMD's Zen and Zen 2 look
   lines up there by their place in a page and 8 bits, each of two bits of the address (Lipp et al. 2020, doi:10.1145/3320269.3384746). */
static int collide(size_t stride) {
    for (size_t s = 1; s < LANES; s++) {
        size_t a = s * stride, up = a >> 12 ^ a >> 27, middle = a >> 13 ^ a >> 26, down = a >> 14 ^ a >> 25;
        if (!(a & 4095) && !((up | middle | down) & 1) && !((a >> 15 ^ a >> 20) & 31)) return 1;
    }
    return 0;
}

#ifdef __AVX512F__
/* Sums over groups of `far` lanes, of two vectors: each group's halves are added up, b's behind a's. */
INLINE vec fold(vec a, vec b, int far) {
    ints low;
    for (int i = 0; i < LANES; i++) low[i] = i / far * 2 * far + i % far;
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + far);
}

/* The sum of each of LANES vectors, in one. */
INLINE vec sums(vec *v) {
#pragma GCC unroll 4
    for (int n = LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) v[i] = fold(v[2 * i], v[2 * i + 1], n);
    return v[0];
}
#else
/* The sum of each of LANES vectors, in one. */
INLINE vec sums(vec *v) {
    __m256 *x = (__m256 *)v;
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return (vec)(_mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31));
}
#endif

/* Rows of the tile that `rows` of them, up to 8, go into. */
static size_t tile_rows(size_t rows) { return rows > 4 ? 8 : rows > 2 ? 4 : rows; }

/* f(..., rows), compiled for each number of rows that a tile can have. */
#define FOR_ROWS_OF(rows, f, ...) \
    (rows == 8 ? f(__VA_ARGS__, 8) : rows == 4 ? f(__VA_ARGS__, 4) : rows == 2 ? f(__VA_ARGS__, 2) : f(__VA_ARGS__, 1))

/* y = silu(gate) * up; y may be gate. */
static void swiglu(const float *gate, const float *up, float *y, size_t width) {
#pragma omp simd
    for (size_t i = 0; i < width; i++) y[i] = gate[i] / (1 + power(-gate[i])) * up[i];
}

/* Each of p (count,) as e^p over the sum of all of them. */
static void softmax(float *p, size_t count) {
    float most = -INFINITY, total = 0;
#pragma omp simd reduction(max : most)
    for (size_t t = 0; t < count; t++) most = p[t] > most ? p[t] : most;
#pragma omp simd reduction(+ : total)
    for (size_t t = 0; t < count; t++) total += p[t] = power(p[t] - most);
    for (size_t t = 0; t < count; t++) p[t] /= total;
}

/* -- what Python describes a layer and a step by; also in model/kernels.py ------------------------------------------------- */

typedef struct { /* the attention of one layer, as far as it is on this rank */
    int64_t dtype, hidden;
    int64_t heads, kv_heads, width; /* width of a head */
    int64_t group, skipped;         /* query heads of a KV head; how many of the first group are on other ranks */
    double eps;
    const void *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o; /* weights; NULL where there is none */
} Attention;

typedef struct { /* tokens of one step */
    int64_t rows, threads;
    int64_t size, blocks;     /* tokens in a cache block; blocks that a row of `tables` names */
    const int64_t *slots;     /* (rows,) where each token's K and V go: block x size + offset */
    const int64_t *positions; /* (rows,) */
    const int64_t *tables;    /* (rows, blocks), the blocks of each sequence, where a token of each is in this step */
    const void *cos, *sin;    /* (rows, width), of each token's position; sin negative in its first half */
} Step;

/* Width of a token's q, k and v side by side. */
static size_t all_heads(const Attention *a) { return (a->heads + 2 * a->kv_heads) * a->width; }

typedef struct { /* the MLP of one layer, as far as it is on this rank */
    int64_t dtype, hidden, inner;
    double eps;
    const void *norm, *gate_up, *gate_up_bias, *down;
} Mlp;

typedef struct {
    const Attention *attention;
    const Mlp *mlp;
} Layer;

typedef struct { /* how this rank adds up with others while layers are computed: shm.c's labkit_all_reduce and its arguments */
    int (*all_reduce)(void *group, void *data, size_t count, int dtype, size_t one_shot);
    void *group;
    int64_t dtype, one_shot;
    int64_t number;    /* of the last operation with other ranks */
    double seconds[2]; /* spent in those behind attention, and behind MLPs, so far */
    struct {           /* what the launcher sees of it (launch/board.py); NULL if there is none */
        int64_t number;
        double since;
        char waiting;
    } *doing;
} Sums;

#define T f32
#define NAME(name) name##_f32
#include "typed.h"
#undef T
#undef NAME
#define T bf16
#define NAME(name) name##_bf16
#include "typed.h"

#if defined __AVX512F__ && defined __linux__ && __GNUC__ >= 11
#include "amx.h"
#else
int labkit_has_tiles(void) { return 0; }
#define by_tiles(...) 0
#define tiled_attention(...) (void)0
#define tiled_piece(...) (void)0
#define tiled_mlp(...) (void)0
#define tiled_linear(...) (void)0
#endif

/* -- what Python calls ---------------------------------------------------------------------------------------------------- */

#define PICK(dtype, name, ...) ((dtype) ? name##_bf16(__VA_ARGS__) : name##_f32(__VA_ARGS__))

/* y (rows, hidden): this rank's part of what attention adds to x (rows, hidden), norm included; one token of each sequence.
   k, v: the layer's cache (all blocks, size, kv_heads, width). */
void labkit_attention(const Attention *a, const Step *s, const void *x, void *k, void *v, void *y) {
    if (by_tiles(a->dtype, s->rows, a->hidden, a->width)) tiled_attention(a, s, x, k, v, y);
    else PICK(a->dtype, attention, a, s, x, k, v, y);
}

/* y (rows, hidden): this rank's part of what the MLP adds to x (rows, hidden), norm included. */
void labkit_mlp(const Mlp *m, size_t rows, int threads, const void *x, void *y) {
    if (by_tiles(m->dtype, rows, m->hidden, m->inner)) tiled_mlp(m, rows, threads, x, y);
    else PICK(m->dtype, mlp, m, rows, threads, x, y);
}

/* y (rows, out) = x (rows, in) times w (out, in) transposed, plus bias (out,) unless NULL; y in float32 if `wide`. */
void labkit_linear(const void *x, const void *w, const void *bias, void *y, int wide, size_t rows, size_t in, size_t out, int dtype,
                   int threads) {
    if (by_tiles(dtype, rows, in, out)) tiled_linear(x, NULL, 0, w, bias, y, wide, rows, in, out, threads);
    else PICK(dtype, single_linear, x, w, bias, y, wide, rows, in, out, threads);
}

/* y (rows, width) = x / sqrt(mean of x^2 + eps) * weight (width,). */
void labkit_rms_norm(const void *x, const void *weight, void *y, size_t rows, size_t width, float eps, int dtype, int threads) {
    PICK(dtype, rms_norm, x, weight, y, rows, width, eps, threads);
}

/* y (rows, width) = silu(gate) * up, of gate_up (rows, 2 width). */
void labkit_swiglu(const void *gate_up, void *y, size_t rows, size_t width, int dtype, int threads) {
    PICK(dtype, gated, gate_up, y, rows, width, threads);
}

/* Normalises (where the model does) and rotates q and k of qkv (rows, all heads, width) in place, and puts k and v into the cache. */
void labkit_prepare(const Attention *a, const Step *s, void *qkv, void *k, void *v) { PICK(a->dtype, prepare, a, s, qkv, k, v); }

/* y (rows, heads, width): attention for qkv (rows, all heads, width) as it comes from its product, one token of each sequence. */
void labkit_singles(const Attention *a, const Step *s, const void *qkv, void *k, void *v, void *y) {
    PICK(a->dtype, singles, a, s, qkv, k, v, y);
}

/* y (rows, heads x width): attention for `rows` rows of qkv (s->rows, all heads, width) from row `from` on, the tokens from
   position `start` on of the sequence in blocks `table`; their K and V are in the cache. */
void labkit_piece(const Attention *a, const Step *s, size_t from, size_t rows, size_t start, const int64_t *table, const void *qkv,
                  const void *k, const void *v, void *y) {
    if (by_tiles(a->dtype, FEW + 1, a->width, a->hidden)) tiled_piece(a, s, from, rows, start, table, qkv, k, v, y);
    else PICK(a->dtype, piece, a, s, from, rows, start, table, qkv, k, v, y);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* y (count,) becomes its sum over ranks. `which`: of `seconds`. */
static int reduce(Sums *sums, int which, void *y, size_t count) {
    double began = now();
    sums->number++;
    if (sums->doing) sums->doing->number = sums->number, sums->doing->since = began, sums->doing->waiting = 1;
    int failed = sums->all_reduce(sums->group, y, count, sums->dtype, sums->one_shot);
    double ended = now();
    if (sums->doing && !failed) sums->doing->since = ended, sums->doing->waiting = 0;
    sums->seconds[which] += ended - began;
    return failed;
}

/* x (rows, hidden), the residual, becomes what it is behind `count` layers, for one token of each sequence; y: room for as much.
   k, v: each layer's cache; sums: NULL if this rank is alone. Returns 0, or what all_reduce said when it failed. */
int labkit_layers(const Layer *layers, size_t count, const Step *s, void *x, void *const *k, void *const *v, void *y, Sums *sums) {
    for (const Layer *l = layers; l < layers + count; l++, k++, v++) {
        size_t all = s->rows * l->mlp->hidden;
        int failed;
        labkit_attention(l->attention, s, x, *k, *v, y);
        if (sums && (failed = reduce(sums, 0, y, all))) return failed;
        PICK(l->mlp->dtype, add, x, y, all);
        labkit_mlp(l->mlp, s->rows, s->threads, x, y);
        if (sums && (failed = reduce(sums, 1, y, all))) return failed;
        PICK(l->mlp->dtype, add, x, y, all);
    }
    return 0;
}
