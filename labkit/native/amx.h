/* Attention of a piece of a prompt in bfloat16, on tile registers (AMX). Its two products take most of their time in rearranging
   what they multiply, so K and V are laid out once for all queries that look at them, straight from the blocks of the cache. Of
   32 queries all scores are kept; what lies behind them all is not computed. */

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512bf16")))
enum { SIDE = 32, SQUARE = SIDE * SIDE }; /* what eight tiles compute at once: (32, 32) of 32-long rows and columns */

/* Whether this processor has tiles and the system lets this process use them. */
int labkit_has_tiles(void) {
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, ASK, TILES);
}

/* sum (32, 32), of rows `width` apart, = a (32, 32 steps), of rows `stride` apart, times b (steps, 2, 16, 16, 2): for each 32 rows
   of the right side and each 16 of its columns a tile, in which two rows are side by side. */
AMX INLINE void square(const bf16 *a, size_t stride, const bf16 *b, size_t steps, float *sum, size_t width) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (size_t k = 0; k < steps; k++, a += SIDE, b += SQUARE) {
        _tile_loadd(4, a, 2 * stride);
        _tile_loadd(5, a + 16 * stride, 2 * stride);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + SQUARE / 2, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, 4 * width); _tile_stored(1, sum + 16, 4 * width);
    _tile_stored(2, sum + 16 * width, 4 * width); _tile_stored(3, sum + 16 * width + 16, 4 * width);
}

/* Of 16 rows (16,): swaps the off-diagonal n x n parts of each 2n x 2n part; for n = 1, 2, 4, 8 in turn, a transposition. */
INLINE void swap(ints *rows, int n) {
    ints low, high;
    for (int j = 0; j < 16; j++) low[j] = j & n ? 16 + j - n : j, high[j] = j & n ? 16 + j : j + n;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (!(i & n)) {
            ints a = rows[i], b = rows[i + n];
            rows[i] = __builtin_shuffle(a, b, low), rows[i + n] = __builtin_shuffle(a, b, high);
        }
}

/* A tile of K transposed, of 16 tokens' 32 dimensions. */
static void keys_tile(const bf16 *k, size_t token, bf16 *tile) {
    ints rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) memcpy(rows + i, k + i * token, sizeof *rows);
    swap(rows, 1), swap(rows, 2), swap(rows, 4), swap(rows, 8);
    memcpy(tile, rows, sizeof rows);
}

/* Half a tile of V, of 16 tokens' 16 dimensions; zeros from token `count` on, where the cache may hold anything. */
static void values_tile(const bf16 *v, size_t token, size_t count, bf16 *tile) {
    for (size_t t = 0; t < 16; t++)
        for (size_t i = 0; i < 16; i++) tile[t / 2 * 32 + 2 * i + t % 2] = t < count ? v[t * token + i] : 0;
}

/* p (end,) = e^((score - the most of them) scale) of the first `visible` scores, and zeros; returns their sum. */
AMX static float softmax(const float *scores, bf16 *p, int visible, int end, float scale) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int t = 0; t < visible; t += 16) {
        __mmask16 there = visible - t < 16 ? (1 << (visible - t)) - 1 : 0xffff;
        most = _mm512_mask_max_ps(most, there, most, _mm512_loadu_ps(scores + t));
    }
    vec shift = (vec)_mm512_set1_ps(_mm512_reduce_max_ps(most) * scale * 1.44269504f);
    for (int t = 0; t < end; t += 16) {
        __mmask16 there = visible - t >= 16 ? 0xffff : visible > t ? (1 << (visible - t)) - 1 : 0;
        vec x = (vec)_mm512_loadu_ps(scores + t) * (scale * 1.44269504f) - shift, n = (vec)_mm512_roundscale_ps((__m512)x, 0);
        vec r = x - n; /* 2^r by its series in r ln 2, |r| <= 1/2 */
        vec series = 1 + r * (0.69314718f + r * (0.24022651f + r * (0.05550411f + r * (0.00961813f + r * 0.00133336f))));
        __m512 e = _mm512_maskz_scalef_ps(there, (__m512)series, (__m512)n);
        __m256bh rounded = _mm512_cvtneps_pbh(e);
        sum = _mm512_add_ps(sum, _mm512_cvtpbh_ps(rounded)); /* of what is multiplied: then weights do add up to 1 */
        _mm256_storeu_si256((__m256i *)(p + t), (__m256i)rounded);
    }
    return _mm512_reduce_add_ps(sum);
}

/* y (rows, heads x width): attention for `rows` rows of qkv (s->rows, all heads, width) from row `from` on, the tokens from
   position `start` on of the sequence in blocks `table`; their K and V are in the cache. Widths are multiples of 32, blocks of 16. */
AMX void labkit_piece(const Attention *a, const Step *s, size_t from, size_t rows, size_t start, const int64_t *table,
                      const bf16 *qkv, const bf16 *k, const bf16 *v, bf16 *y) {
    const struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    size_t d = a->width, each = all_heads(a), token = a->kv_heads * d, context = start + rows;
    size_t steps = (context + SIDE - 1) / SIDE, wide = steps * SIDE, parts = (rows + SIDE - 1) / SIDE;
    size_t far = wide + SIDE; /* between two rows of scores: were it a multiple of 4 KiB, they'd share a few places in the cache */
    size_t one = wide * d; /* numbers of a KV head's K, or V */
    bf16 *keys = (bf16 *)scratch(FOR_TILES, a->kv_heads * one), *values = keys + a->kv_heads * one; /* as tiles */
    float scale = 1 / sqrtf(d);
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
        float *scores = scratch(FOR_SUMS, SIDE * (far + far / 2 + d + d / 2)), *sum = scores + SIDE * far;
        bf16 *p = (bf16 *)(sum + SIDE * d), *q = p + SIDE * far;
        _tile_loadconfig(&tiles);
#pragma omp for
        for (size_t n = 0; n < a->kv_heads * wide; n += 16) {
            size_t kv = n / wide, t = n % wide, count = t < context ? context - t : 0; /* of none there may be no block */
            size_t at = count ? (table[t / s->size] * s->size + t % s->size) * token + kv * d : 0, half = t / 16 % 2;
            bf16 *k_to = keys + kv * one + t / SIDE * SIDE * d + half * SQUARE / 2;
            bf16 *v_to = values + kv * one + t / SIDE * SQUARE + half * SQUARE / 4;
            for (size_t i = 0; i < d; i += 32) keys_tile(k + at + i, token, k_to + i * SIDE);
            for (size_t i = 0; i < d; i += 16)
                values_tile(v + at + i, token, count, v_to + i / SIDE * SIDE * wide + i / 16 % 2 * SQUARE / 2);
        }
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < parts * a->heads; task++) { /* of each head, those that see most come first */
            size_t at = (parts - 1 - task % parts) * SIDE, h = task / parts, kv = (h + a->skipped) / a->group;
            size_t count = rows - at < SIDE ? rows - at : SIDE, seen = (start + at + count + SIDE - 1) / SIDE;
            const bf16 *its_keys = keys + kv * one, *its_values = values + kv * one;
            float total[SIDE];
            memset(q, 0, SIDE * d * sizeof(bf16));
            for (size_t r = 0; r < count; r++) memcpy(q + r * d, qkv + (from + at + r) * each + h * d, d * sizeof(bf16));
            for (size_t c = 0; c < seen; c++) square(q, d, its_keys + c * SIDE * d, d / SIDE, scores + c * SIDE, far);
            for (size_t r = 0; r < count; r++)
                total[r] = softmax(scores + r * far, p + r * far, start + at + r + 1, seen * SIDE, scale);
            for (size_t i = 0; i < d; i += SIDE) square(p, far, its_values + i * wide, seen, sum + i, d);
            for (size_t r = 0; r < count; r++)
                for (size_t i = 0; i < d; i += SIDE)
#pragma omp simd
                    for (size_t j = 0; j < SIDE; j++)
                        y[((at + r) * a->heads + h) * d + i + j] = narrow_bf16(sum[r * d + i + j] / total[r]);
        }
        _tile_release();
    }
}
