/* On tile registers (AMX), in bfloat16: products of more than a few rows, and attention of a piece of a prompt.

   Weights stay as they lie: of y^T = w x^T the left side's tiles are what lies in memory, and on the right x is rearranged, which
   is small. What comes out are columns of y, so a SwiGLU's results are, but for rounding, the tiles of the next product. */

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512bf16")))
enum { SIDE = 32, SQUARE = SIDE * SIDE, AHEAD = 3 }; /* eight tiles compute (32, 32) at once, of 32-long rows and columns */

/* Whether this processor has tiles and the system lets this process use them. */
int labkit_has_tiles(void) {
    enum { ASK = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    static int has = -1;
    if (has < 0) has = __builtin_cpu_supports("amx-bf16") && !syscall(SYS_arch_prctl, ASK, TILES);
    return has;
}

/* Whether products of `rows` rows are for tiles, of widths `in` and `out`. */
static int by_tiles(int64_t dtype, size_t rows, size_t in, size_t out) {
    return dtype && rows > FEW && in % SIDE == 0 && out % SIDE == 0 && labkit_has_tiles();
}

/* Each thread does this before its first tile. */
AMX INLINE void start_tiles(void) {
    static const struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } all = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&all);
}

/* sum (32, 32), of rows `width` apart, = a (32, 32 steps), of rows `stride` apart, times b (steps, 2, 16, 16, 2): for each 32 rows
   of the right side and each 16 of its columns a tile, in which two rows are side by side. Unless NULL, `next` is what will
   be `a` next: both are then fetched from memory, AHEAD steps before they are used. */
AMX INLINE void square(const bf16 *a, size_t stride, const bf16 *b, size_t steps, float *sum, size_t width,
                   const bf16 *next) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (size_t k = 0; k < steps; k++, a += SIDE, b += SQUARE) {
        if (next) {
            const bf16 *ahead = k + AHEAD < steps ? a + AHEAD * SIDE : next + (k + AHEAD - steps) * SIDE;
            for (size_t i = 0; i < SIDE; i++) __builtin_prefetch(ahead + i * stride, 0, 3);
        }
        _tile_loadd(4, a, 2 * stride);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + SQUARE / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * stride, 2 * stride);
        _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, 4 * width); _tile_stored(1, sum + 16, 4 * width);
    _tile_stored(2, sum + 16 * width, 4 * width); _tile_stored(3, sum + 16 * width + 16, 4 * width);
}

/* Of 16 rows (16,): swaps the off-diagonal n x n parts of each 2n x 2n part. */
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

INLINE void transpose(ints *rows) { swap(rows, 1), swap(rows, 2), swap(rows, 4), swap(rows, 8); }

/* A tile of x transposed: of 16 rows, `stride` apart, 32 columns; where there are fewer rows, the last one again. */
INLINE void columns(const bf16 *x, size_t stride, size_t count, bf16 *tile) {
    ints rows[16];
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; i++) memcpy(rows + i, x + (i < count ? i : count - 1) * stride, sizeof *rows);
    transpose(rows);
    memcpy(tile, rows, sizeof rows);
}

/* 2^x to 4e-5 of it, a hundredth of bfloat16's step, by the series of 2^r in r ln 2, |r| <= 1/2. */
INLINE vec exp2_of(vec x) {
    vec n = (vec)_mm512_roundscale_ps((__m512)x, 0), r = x - n;
    vec series = 1 + r * (0.69314718f + r * (0.24022651f + r * (0.05550411f + r * 0.00961813f)));
    return (vec)_mm512_scalef_ps((__m512)series, (__m512)n);
}

/* -- products ------------------------------------------------------------------------------------------------------- */

/* tiles (blocks of 32 rows, in / 32, 2, 16, 16, 2) of x (rows, in), normalised unless `norm` is NULL. All threads call it. */
AMX static void lay_out(const bf16 *x, const bf16 *norm, float eps, size_t rows, size_t in, bf16 *tiles) {
    size_t steps = in / SIDE;
#pragma omp for
    for (size_t n = 0; n < (rows + SIDE - 1) / SIDE * 2; n++) {
        size_t first = n * 16 < rows ? n * 16 : rows - 1, count = rows - first < 16 ? rows - first : 16;
        const bf16 *from = x + first * in;
        if (norm) {
            bf16 *normed = (bf16 *)scratch(FOR_SUMS, 16 * in / 2);
            rms_norm_bf16(from, norm, normed, count, in, eps, 1);
            from = normed;
        }
        for (size_t k = 0; k < steps; k++)
            columns(from + k * SIDE, in, count, tiles + (n / 2 * steps + k) * SQUARE + n % 2 * SQUARE / 2);
    }
}

/* y (rows, out) = what is in `tiles` times w (out, in) transposed, plus bias (out,) unless NULL; y in float32 if `wide`. All
   threads call it. */
AMX static void multiply(const bf16 *tiles, const bf16 *w, const bf16 *bias, void *y, int wide, size_t rows, size_t in,
                         size_t out) {
#pragma omp for
    for (size_t o = 0; o < out; o += SIDE)
        for (size_t first = 0; first < rows; first += SIDE) {
            float sum[SQUARE] __attribute__((aligned(64)));
            square(w + o * in, in, tiles + first * in, in / SIDE, sum, SIDE, first ? NULL : w + (o + SIDE) * in);
            for (size_t part = 0; part < 4; part++) {
                size_t row = first + part % 2 * 16, at = o + part / 2 * 16;
                const float *its = sum + part / 2 * SQUARE / 2 + part % 2 * 16;
                ints sums[16];
#pragma GCC unroll 16
                for (size_t i = 0; i < 16; i++) memcpy(sums + i, its + i * SIDE, sizeof *sums);
                transpose(sums);
                vec add = bias ? load_bf16(bias + at) : (vec){0};
#pragma GCC unroll 16
                for (size_t i = 0; i < 16; i++)
                    if (row + i < rows) {
                        vec result = (vec)sums[i] + add;
                        __m256bh rounded = _mm512_cvtneps_pbh((__m512)result);
                        if (wide) memcpy((float *)y + (row + i) * out + at, &result, sizeof result);
                        else memcpy((bf16 *)y + (row + i) * out + at, &rounded, sizeof rounded);
                    }
            }
        }
}

/* Rows that are multiplied at once: as tiles they, and what comes of them, stay in the second-level cache. */
static size_t rows_at_once(size_t in) { return in > 1024 ? 256 : 512; }

/* y (rows, out) = x (rows, in), normalised unless `norm` is NULL, times w (out, in) transposed, plus bias (out,) unless NULL;
   y in float32 if `wide`. */
AMX static void tiled_linear(const bf16 *x, const bf16 *norm, float eps, const bf16 *w, const bf16 *bias, void *y, int wide,
                             size_t rows, size_t in, size_t out, int threads) {
    size_t chunk = rows_at_once(in);
    bf16 *tiles = (bf16 *)scratch(FOR_TILES, chunk * in / 2);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        start_tiles();
        for (size_t from = 0; from < rows; from += chunk) {
            size_t count = rows - from < chunk ? rows - from : chunk;
            lay_out(x + from * in, norm, eps, count, in, tiles);
            multiply(tiles, w, bias, (char *)y + from * out * (wide ? 4 : 2), wide, count, in, out);
        }
        _tile_release();
    }
}

/* silu(gate) * up of 32 features of 32 rows, as a tile of the product that comes next. sums: gate, then up, (32 features, 32 rows)
   each. bias: of these gates on, with those of up `inner` further; or NULL. */
AMX INLINE void gated_tile(const float *sums, const bf16 *bias, size_t inner, bf16 *tile) {
    for (size_t feature = 0; feature < SIDE; feature += 2)
        for (size_t row = 0; row < SIDE; row += 16) {
            ints pair[2];
            for (size_t i = 0; i < 2; i++) {
                const float *at = sums + (feature + i) * SIDE + row;
                vec g = load_f32(at), u = load_f32(at + SQUARE);
                if (bias) g += wide_bf16(bias[feature + i]), u += wide_bf16(bias[inner + feature + i]);
                vec y = g / (1 + exp2_of(g * -1.44269504f)) * u;
                pair[i] = (ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)y));
            }
            pair[0] |= pair[1] << 16;
            memcpy(tile + row * SIDE + feature * 16, pair, sizeof *pair);
        }
}

/* y (rows, hidden): this rank's part of what the MLP adds to x (rows, hidden), norm included. */
AMX static void tiled_mlp(const Mlp *m, size_t rows, int threads, const bf16 *x, bf16 *y) {
    size_t hidden = m->hidden, inner = m->inner, chunk = rows_at_once(hidden);
    const bf16 *gate = m->gate_up, *up = gate + inner * hidden, *bias = m->gate_up_bias;
    bf16 *tiles = (bf16 *)scratch(FOR_TILES, chunk * (hidden + inner) / 2), *between = tiles + chunk * hidden;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        start_tiles();
        for (size_t from = 0; from < rows; from += chunk) {
            size_t count = rows - from < chunk ? rows - from : chunk;
            lay_out(x + from * hidden, m->norm, m->eps, count, hidden, tiles);
#pragma omp for
            for (size_t o = 0; o < inner; o += SIDE)
                for (size_t first = 0; first < count; first += SIDE) {
                    float sum[2 * SQUARE] __attribute__((aligned(64)));
                    square(gate + o * hidden, hidden, tiles + first * hidden, hidden / SIDE, sum, SIDE,
                           first ? NULL : up + o * hidden);
                    square(up + o * hidden, hidden, tiles + first * hidden, hidden / SIDE, sum + SQUARE, SIDE,
                           first ? NULL : gate + (o + SIDE) * hidden);
                    gated_tile(sum, bias ? bias + o : NULL, inner, between + first * inner + o * SIDE);
                }
            multiply(between, m->down, NULL, y + from * hidden, 0, count, inner, hidden);
        }
        _tile_release();
    }
}

/* -- attention ------------------------------------------------------------------------------------------------------ */

/* y (rows, hidden): this rank's part of what attention adds to x (rows, hidden), norm included; one token of each sequence. */
static void tiled_attention(const Attention *a, const Step *s, const bf16 *x, bf16 *k, bf16 *v, bf16 *y) {
    size_t rows = s->rows, each = all_heads(a), inner = a->heads * a->width;
    bf16 *qkv = (bf16 *)scratch(FOR_HALVES, rows * (each + inner) / 2 + 1), *out = qkv + rows * each;
    tiled_linear(x, a->norm, a->eps, a->qkv, a->qkv_bias, qkv, 0, rows, a->hidden, each, s->threads);
    singles_bf16(a, s, qkv, k, v, out);
    tiled_linear(out, NULL, 0, a->o, NULL, y, 0, rows, inner, a->hidden, s->threads);
}

/* Half a tile of V, of 16 tokens' 16 dimensions; zeros from token `count` on, where the cache may hold anything. */
static void values_tile(const bf16 *v, size_t token, size_t count, bf16 *tile) {
    for (size_t t = 0; t < 16; t++)
        for (size_t i = 0; i < 16; i++) tile[t / 2 * 32 + 2 * i + t % 2] = t < count ? v[t * token + i] : 0;
}

/* p (end,) = e^((score - the most of them) scale) of the first `visible` scores, and zeros; returns their sum. */
AMX static float weights_of(float *scores, bf16 *p, size_t visible, size_t end, float scale) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 most[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)}, sum = _mm512_setzero_ps();
    for (size_t t = visible; t < end; t++) scores[t] = -1e30f;
    for (size_t t = 0; t < end; t += SIDE)
        for (int i = 0; i < 2; i++) most[i] = _mm512_max_ps(most[i], _mm512_loadu_ps(scores + t + 16 * i));
    scale *= 1.44269504f;
    vec shift = (vec)_mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1])) * scale);
    for (size_t t = 0; t < end; t += SIDE) {
        vec low = exp2_of(load_f32(scores + t) * scale - shift), high = exp2_of(load_f32(scores + t + 16) * scale - shift);
        __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        sum = _mm512_dpbf16_ps(sum, rounded, ones); /* of what is multiplied: then weights do add up to 1 */
        memcpy(p + t, &rounded, sizeof rounded);
    }
    return _mm512_reduce_add_ps(sum);
}

/* As labkit_piece; widths are multiples of 32, blocks of 16.
   K and V are laid out as tiles once for all queries that look at them, straight from the blocks of the cache: rearranging what they
   multiply is most of what the two products take. Of 32 queries all scores are kept; what lies behind them all is not computed. */
AMX static void tiled_piece(const Attention *a, const Step *s, size_t from, size_t rows, size_t start, const int64_t *table,
                            const bf16 *qkv, const bf16 *k, const bf16 *v, bf16 *y) {
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
        start_tiles();
#pragma omp for
        for (size_t n = 0; n < a->kv_heads * wide; n += 16) {
            size_t kv = n / wide, t = n % wide, count = t < context ? context - t : 0; /* of none there may be no block */
            size_t at = count ? (table[t / s->size] * s->size + t % s->size) * token + kv * d : 0, half = t / 16 % 2;
            bf16 *k_to = keys + kv * one + t / SIDE * SIDE * d + half * SQUARE / 2;
            bf16 *v_to = values + kv * one + t / SIDE * SQUARE + half * SQUARE / 4;
            for (size_t i = 0; i < d; i += 32) columns(k + at + i, token, 16, k_to + i * SIDE);
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
            for (size_t c = 0; c < seen; c++) square(q, d, its_keys + c * SIDE * d, d / SIDE, scores + c * SIDE, far, NULL);
            for (size_t r = 0; r < count; r++)
                total[r] = weights_of(scores + r * far, p + r * far, start + at + r + 1, seen * SIDE, scale);
            for (size_t i = 0; i < d; i += SIDE) square(p, far, its_values + i * wide, seen, sum + i, d, NULL);
            for (size_t r = 0; r < count; r++)
                for (size_t i = 0; i < d; i += SIDE)
#pragma omp simd
                    for (size_t j = 0; j < SIDE; j++)
                        y[((at + r) * a->heads + h) * d + i + j] = narrow_bf16(sum[r * d + i + j] / total[r]);
        }
        _tile_release();
    }
}
