/* What depends on how numbers are stored; kernels.c includes it for each format, T, with names of its own, NAME(...). */

static void NAME(widen)(const T *x, float *y, size_t count) {
    for (size_t i = 0; i < count; i++) y[i] = NAME(wide)(x[i]);
}

static void NAME(narrow_all)(const float *x, T *y, size_t count) {
    for (size_t i = 0; i < count; i++) y[i] = NAME(narrow)(x[i]);
}

/* x += y */
static void NAME(add)(T *x, const T *y, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = NAME(narrow)(NAME(wide)(x[i]) + NAME(wide)(y[i]));
}

/* -- products ------------------------------------------------------------------------------------------------------- */

/* total[r x LANES + o], of row r of x (rows, in) and row o of w (outs, in): LANES sums, each of every LANES-th product. The rows of w
   are `stride` numbers apart; what is `next` numbers on is fetched meanwhile. */
INLINE void NAME(dots)(const float *x, const T *w, vec *total, size_t in, size_t stride, size_t next, const int rows,
                       const int outs) {
    vec sum[16] = {0}, weights[LANES];
    for (size_t k = 0; k + LANES <= in; k += LANES) {
        for (int o = 0; o < outs; o++) {
            weights[o] = NAME(load)(w + o * stride + k);
            __builtin_prefetch(w + o * stride + k + next, 0, KEEP);
        }
        for (int r = 0; r < rows; r++) {
            vec values = load_f32(x + r * in + k);
            __asm__("" : "+v"(values)); /* a register: GCC would load it once for each product */
            for (int o = 0; o < outs; o++) sum[r * outs + o] += values * weights[o];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) total[r * LANES + o] = sum[r * outs + o];
}

/* LANES sums for each of `rows` rows: y (rows, LANES) = x (rows, in) times w (LANES, in) transposed; stride, next: see `dots`. */
INLINE void NAME(tile)(const float *x, const T *w, float *y, size_t in, size_t stride, size_t next, const int rows) {
    /* With 16 registers 4 rows by 3: with no more than 8 sums, each would have to wait for itself. */
    const int outs = LANES == 8 && rows == 4 ? 3 : LANES / rows, left = LANES % outs, most = LANES - left;
    vec total[8 * LANES];
    for (int o = 0; o < most; o += outs) NAME(dots)(x, w + o * stride, total + o, in, stride, next, rows, outs);
    if (left) NAME(dots)(x, w + most * stride, total + most, in, stride, next, rows, left);
    for (int r = 0; r < rows; r++) {
        vec all = sums(total + r * LANES);
        memcpy(y + r * LANES, &all, sizeof all);
        for (size_t k = in / LANES * LANES; k < in; k++)
            for (int o = 0; o < LANES; o++) y[r * LANES + o] += x[r * in + k] * NAME(wide)(w[o * stride + k]);
    }
}

/* What `linear` does, for many rows, where it is computing that takes the time. Lanes are rows of x, rearranged for that; each number
   of w, widened, multiplies 2 LANES of them. Rows of w are `stride` numbers apart. What is used again and again stays in caches: OUTS
   x `deep` numbers of w in the first level, AT_ONCE x `deep` of x in the second. */
static void NAME(many)(const float *x, const T *w, size_t stride, const T *bias, float *y, size_t rows, size_t in, size_t out,
                       int threads) {
    enum { OUTS = 6, PANEL = 2 * LANES, DEEPEST = 768 };
    size_t deep = in < DEEPEST ? in : DEEPEST, high = (rows + PANEL - 1) / PANEL * PANEL;
    float *panels = scratch(FOR_TILES, high * deep);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (size_t from = 0, depth; from < in; from += depth) {
        depth = in - from < deep ? in - from : deep;
#pragma omp for
        for (size_t r = 0; r < high; r++) { /* zeros fill up the last panel */
            float *to = panels + r / PANEL * depth * PANEL + r % PANEL;
            for (size_t k = 0; k < depth; k++) to[k * PANEL] = r < rows ? x[r * in + from + k] : 0;
        }
#pragma omp for
        for (size_t first = 0; first < out; first += OUTS) {
            size_t outs = out - first < OUTS ? out - first : OUTS;
            const T *here = w + first * stride + from;
            float wide[OUTS][DEEPEST];
            for (size_t o = 0; o < outs; o++) NAME(widen)(here + o * stride, wide[o], depth);
            for (size_t r = 0; r < high; r += PANEL) {
                vec sum[OUTS][2] = {0};
                const float *panel = panels + r * depth;
                for (size_t k = 0; k < depth; k++, panel += PANEL) {
                    if (r == 0 && k % 16 == 0) /* the next rows of w */
                        for (size_t o = 0; o < OUTS; o++) __builtin_prefetch(here + (OUTS + o) * stride + k, 0, 2);
                    vec values[2] = {load_f32(panel), load_f32(panel + LANES)};
                    for (int o = 0; o < OUTS; o++)
                        for (int half = 0; half < 2; half++) sum[o][half] += values[half] * wide[o][k];
                }
                float some[OUTS][PANEL];
                memcpy(some, sum, sizeof some);
                for (size_t i = r; i < r + PANEL && i < rows; i++)
                    for (size_t o = 0; o < outs; o++) {
                        float *at = y + i * out + first + o;
                        *at = (from ? *at : bias ? NAME(wide)(bias[first + o]) : 0) + some[o][i - r];
                    }
            }
        }
    }
}

/* y (rows, out) = x (rows, in) times w (out, in) transposed, plus bias (out,) unless NULL. */
static void NAME(linear)(const float *x, const T *w, const T *bias, float *y, size_t rows, size_t in, size_t out, int threads) {
    if (out < LANES) {
        for (size_t r = 0; r < rows; r++)
            for (size_t o = 0; o < out; o++) {
                y[r * out + o] = bias ? NAME(wide)(bias[o]) : 0;
                for (size_t k = 0; k < in; k++) y[r * out + o] += x[r * in + k] * NAME(wide)(w[o * in + k]);
            }
        return;
    }
    if (rows > MANY) {
        for (size_t r = 0, n; r < rows; r += n) {
            n = at_once(rows - r);
            NAME(many)(x + r * in, w, in, bias, y + r * out, n, in, out, threads);
        }
        return;
    }
    size_t tall = rows < TALL ? tile_rows(rows) : TALL, most = (rows + tall - 1) / tall * tall, tiles = out / LANES;
    if (most > rows) { /* rows of zeros fill up the tile */
        float *filled = memset(scratch(FOR_TILES, most * in), 0, most * in * sizeof(float));
        x = memcpy(filled, x, rows * in * sizeof(float));
    }
    /* Rows far apart that get in each other's way are taken a row further apart; what lies between is for the last tiles then. */
    size_t gap = APART && tiles > LANES && collide(tiles * in * sizeof(T)), spread = APART ? tiles - gap * (LANES - 1) : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (size_t t = 0; t < tiles + (out % LANES > 0); t++) {
        size_t apart = t < spread ? tiles + gap : 1, first = t < spread ? t : spread + (t - spread) * (APART ? tiles + gap : LANES);
        if (t == tiles) first = out - LANES; /* it may overlap others: the same numbers are written twice */
        float sum[MANY * LANES];
        for (size_t r = 0; r < most; r += tall) /* fetched meanwhile: what follows in each stream, or the next tile */
            FOR_ROWS_OF(tall, NAME(tile), x + r * in, w + first * in, sum + r * LANES, in, apart * in, APART ? 384 : LANES * in);
        for (size_t r = 0; r < rows; r++)
            for (size_t o = 0; o < LANES; o++) {
                size_t at = first + o * apart;
                y[r * out + at] = sum[r * LANES + o] + (bias ? NAME(wide)(bias[at]) : 0);
            }
    }
}

/* x = x / sqrt(mean of x^2 + eps) * weight, in place. */
static void NAME(norm)(float *x, const T *weight, size_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (size_t i = 0; i < width; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / width + eps);
    for (size_t i = 0; i < width; i++) x[i] = x[i] * scale * NAME(wide)(weight[i]);
}

/* -- attention -------------------------------------------------------------------------------------------------------- */

/* Normalises (where the model does) and rotates q and k of token `n` by position; puts k and v into the cache. */
static void NAME(place)(const Attention *a, const Step *s, size_t n, float *qkv, T *k_cache, T *v_cache) {
    size_t d = a->width, half = d / 2, heads = a->heads + a->kv_heads;
    const T *cos = (const T *)s->cos + n * d, *sin = (const T *)s->sin + n * d;
    for (size_t h = 0; h < heads; h++) {
        float *x = qkv + h * d;
        if (a->q_norm) NAME(norm)(x, h < (size_t)a->heads ? a->q_norm : a->k_norm, d, a->eps);
        for (size_t i = 0; i < half; i++) {
            float low = x[i], high = x[half + i];
            x[i] = low * NAME(wide)(cos[i]) + high * NAME(wide)(sin[i]);
            x[half + i] = high * NAME(wide)(cos[half + i]) + low * NAME(wide)(sin[half + i]);
        }
    }
    size_t token = a->kv_heads * d, at = s->slots[n] * token;
    NAME(narrow_all)(qkv + a->heads * d, k_cache + at, token);
    NAME(narrow_all)(qkv + heads * d, v_cache + at, token);
}

/* out (rows, width) = p (rows, context) times v (context, width), of one KV head in the cache; columns `at` to at + vecs x LANES. */
INLINE void NAME(mix_some)(const Attention *a, const Step *s, const float *p, size_t context, const T *v, const int64_t *blocks,
                           float *out, size_t at, const int rows, const int vecs) {
    size_t token = a->kv_heads * a->width, block = s->size * token;
    vec total[16] = {0}, values[4];
    for (size_t t = 0; t < context; blocks++) {
        const T *here = v + *blocks * block + at, *next = v + blocks[t + s->size < context] * block + at;
        for (size_t stop = t + s->size < context ? t + s->size : context; t < stop; t++, here += token, next += token) {
            for (int j = 0; j < vecs; j++) values[j] = NAME(load)(here + j * LANES);
            __builtin_prefetch(next), __builtin_prefetch(next + vecs * LANES - 1);
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < vecs; j++) total[r * vecs + j] += p[r * context + t] * values[j];
        }
    }
    for (int r = 0; r < rows; r++) memcpy(out + r * a->width + at, total + r * vecs, vecs * sizeof(vec));
}

/* The same for all whole vecs of columns, as many at once as there are registers. */
INLINE void NAME(mix)(const Attention *a, const Step *s, const float *p, size_t context, const T *v, const int64_t *blocks,
                      float *out, const int rows) {
    const size_t most = (4 * rows > LANES ? LANES / rows : 4) * LANES, width = a->width;
    size_t at = 0;
    for (; at + most <= width; at += most) NAME(mix_some)(a, s, p, context, v, blocks, out, at, rows, most / LANES);
    for (; at + LANES <= width; at += LANES) NAME(mix_some)(a, s, p, context, v, blocks, out, at, rows, 1);
}

/* Of token `n`: query heads that read KV head `kv`, up to 8 from `first` on, over all that the cache has of its sequence.
   A block of the cache holds a multiple of LANES tokens. */
static void NAME(look)(const Attention *a, const Step *s, size_t n, size_t kv, size_t first, size_t heads, const float *q,
                       const T *k, const T *v, float *out) {
    size_t d = a->width, token = a->kv_heads * d, context = s->positions[n] + 1, rows = tile_rows(heads), whole = d / LANES * LANES;
    const int64_t *blocks = s->tables + n * s->blocks;
    float *own = scratch(FOR_HEADS, rows * (2 * d + context)), *p = own + rows * d, *sum = p + rows * context;
    memset(own, 0, rows * d * sizeof(float)); /* heads of zeros fill up the last tile */
    for (size_t i = 0; i < heads * d; i++) own[i] = q[first * d + i] / sqrtf(d);
    k += kv * d, v += kv * d;
    for (size_t t = 0; t < context; t += LANES) {
        float some[8 * LANES];
        FOR_ROWS_OF(rows, NAME(tile), own, k + (blocks[t / s->size] * s->size + t % s->size) * token, some, d, token, LANES * token);
        size_t count = context - t < LANES ? context - t : LANES;
        for (size_t r = 0; r < heads; r++) memcpy(p + r * context + t, some + r * LANES, count * sizeof(float));
    }
    for (size_t r = 0; r < heads; r++) softmax(p + r * context, context);
    memset(p + heads * context, 0, (rows - heads) * context * sizeof(float));
    FOR_ROWS_OF(rows, NAME(mix), a, s, p, context, v, blocks, sum);
    for (size_t r = 0; r < heads; r++)
        for (size_t i = whole; i < d; i++) {
            sum[r * d + i] = 0;
            for (size_t t = 0; t < context; t++)
                sum[r * d + i] += p[r * context + t] * NAME(wide)(v[(blocks[t / s->size] * s->size + t % s->size) * token + i]);
        }
    memcpy(out + first * d, sum, heads * d * sizeof(float));
}

/* qkv (rows, all_heads) -> out (rows, heads, width), of one token of each sequence. */
static void NAME(attend)(const Attention *a, const Step *s, float *qkv, T *k_cache, T *v_cache, float *out) {
    size_t each = all_heads(a), tasks = s->rows * a->kv_heads, work = 0;
    for (size_t n = 0; n < (size_t)s->rows; n++) {
        NAME(place)(a, s, n, qkv + n * each, k_cache, v_cache);
        work += s->positions[n];
    }
    int threads = work > 100 ? s->threads : 1; /* for less they'd take longer to meet */
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (size_t i = 0; i < tasks; i++) {
        size_t n = i / a->kv_heads, kv = i % a->kv_heads;
        size_t stop = (kv + 1) * a->group - a->skipped, heads = stop < (size_t)a->heads ? stop : (size_t)a->heads;
        for (size_t h = kv * a->group > (size_t)a->skipped ? kv * a->group - a->skipped : 0; h < heads; h += 8)
            NAME(look)(a, s, n, kv, h, heads - h < 8 ? heads - h : 8, qkv + n * each, k_cache, v_cache, out + n * a->heads * a->width);
    }
}

/* -- what kernels.c hands to Python ------------------------------------------------------------------------------------- */

static float *NAME(normed)(const T *x, const T *weight, size_t rows, size_t width, float eps, int threads) {
    float *y = scratch(FOR_ROWS, rows * width);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (size_t r = 0; r < rows; r++) {
        NAME(widen)(x + r * width, y + r * width, width);
        NAME(norm)(y + r * width, weight, width, eps);
    }
    return y;
}

static void NAME(attention)(const Attention *a, const Step *s, const T *x, T *k, T *v, T *y) {
    size_t rows = s->rows, each = all_heads(a), inner = a->heads * a->width;
    float *in = NAME(normed)(x, a->norm, rows, a->hidden, a->eps, s->threads);
    float *qkv = scratch(FOR_SUMS, rows * (each + inner + a->hidden)), *out = qkv + rows * each, *sum = out + rows * inner;
    NAME(linear)(in, a->qkv, a->qkv_bias, qkv, rows, a->hidden, each, s->threads);
    NAME(attend)(a, s, qkv, k, v, out);
    NAME(linear)(out, a->o, NULL, sum, rows, inner, a->hidden, s->threads);
    NAME(narrow_all)(sum, y, rows * a->hidden);
}

static void NAME(mlp)(const Mlp *m, size_t rows, int threads, const T *x, T *y) {
    size_t hidden = m->hidden, inner = m->inner, most = rows < AT_ONCE ? rows : AT_ONCE;
    float *both = scratch(FOR_SUMS, most * (3 * inner + hidden)), *gated = both + most * 2 * inner, *sum = gated + most * inner;
    for (size_t from = 0, n; from < rows; from += n, x += n * hidden, y += n * hidden) {
        n = at_once(rows - from);
        float *in = NAME(normed)(x, m->norm, n, hidden, m->eps, threads);
        NAME(linear)(in, m->gate_up, m->gate_up_bias, both, n, hidden, 2 * inner, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > 8)
        for (size_t r = 0; r < n; r++) swiglu(both + r * 2 * inner, both + r * 2 * inner + inner, gated + r * inner, inner);
        NAME(linear)(gated, m->down, NULL, sum, n, inner, hidden, threads);
        NAME(narrow_all)(sum, y, n * hidden);
    }
}

static void NAME(single_linear)(const T *x, const T *w, const T *bias, void *y, int wide, size_t rows, size_t in, size_t out,
                                int threads) {
    size_t most = rows < AT_ONCE ? rows : AT_ONCE;
    float *values = scratch(FOR_ROWS, most * in), *sum = scratch(FOR_SUMS, wide ? 0 : most * out);
    for (size_t from = 0, n; from < rows; from += n) {
        n = at_once(rows - from);
        if (wide) sum = (float *)y + from * out;
        NAME(widen)(x + from * in, values, n * in);
        NAME(linear)(values, w, bias, sum, n, in, out, threads);
        if (!wide) NAME(narrow_all)(sum, (T *)y + from * out, n * out);
    }
}

static void NAME(rms_norm)(const T *x, const T *weight, T *y, size_t rows, size_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (size_t r = 0; r < rows; r++)
        NAME(narrow_all)(NAME(normed)(x + r * width, weight, 1, width, eps, 1), y + r * width, width);
}

static void NAME(gated)(const T *gate_up, T *y, size_t rows, size_t width, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (size_t r = 0; r < rows; r++) {
        float *both = scratch(FOR_ROWS, 2 * width);
        NAME(widen)(gate_up + r * 2 * width, both, 2 * width);
        swiglu(both, both + width, both, width);
        NAME(narrow_all)(both, y + r * width, width);
    }
}

static void NAME(prepare)(const Attention *a, const Step *s, T *qkv, T *k, T *v) {
    size_t each = all_heads(a), qk = each - a->kv_heads * a->width;
#pragma omp parallel for num_threads(s->threads) if (s->threads > 1 && s->rows > 8)
    for (int64_t n = 0; n < s->rows; n++) {
        float *row = scratch(FOR_ROWS, each);
        NAME(widen)(qkv + n * each, row, each);
        NAME(place)(a, s, n, row, k, v);
        NAME(narrow_all)(row, qkv + n * each, qk);
    }
}

static void NAME(singles)(const Attention *a, const Step *s, const T *qkv, T *k, T *v, T *y) {
    size_t rows = s->rows, inner = a->heads * a->width, each = all_heads(a);
    float *wide = scratch(FOR_ROWS, rows * each), *out = scratch(FOR_SUMS, rows * inner);
    NAME(widen)(qkv, wide, rows * each);
    NAME(attend)(a, s, wide, k, v, out);
    NAME(narrow_all)(out, y, rows * inner);
}

/* See labkit_piece. K and V are widened, and V is transposed, once for all queries; of QUERIES of a head all scores are kept. */
static void NAME(piece)(const Attention *a, const Step *s, size_t from, size_t rows, size_t start, const int64_t *table, const T *qkv,
                        const T *k, const T *v, T *y) {
    enum { QUERIES = 64 };
    size_t d = a->width, each = all_heads(a), token = a->kv_heads * d, context = start + rows, parts = (rows + QUERIES - 1) / QUERIES;
    size_t far = context + 16; /* between rows of values: were it a multiple of 4 KiB, they'd share a few places in the cache */
    float *keys = scratch(FOR_HEADS, token * (context + far)), *values = keys + token * context; /* of a KV head after the other */
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
#pragma omp for
        for (size_t n = 0; n < a->kv_heads * context; n++) {
            size_t kv = n / context, t = n % context, at = (table[t / s->size] * s->size + t % s->size) * token + kv * d;
            NAME(widen)(k + at, keys + n * d, d);
            for (size_t i = 0; i < d; i++) values[(kv * d + i) * far + t] = NAME(wide)(v[at + i]);
        }
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < parts * a->heads; task++) { /* those that see most come first */
            size_t at = (parts - 1 - task / a->heads) * QUERIES, h = task % a->heads, kv = (h + a->skipped) / a->group;
            size_t count = rows - at < QUERIES ? rows - at : QUERIES, seen = start + at + count;
            float *q = scratch(FOR_SUMS, QUERIES * (2 * d + context)), *sum = q + QUERIES * d, *p = sum + QUERIES * d;
            for (size_t r = 0; r < count; r++)
                for (size_t i = 0; i < d; i++) q[r * d + i] = NAME(wide)(qkv[(from + at + r) * each + h * d + i]) / sqrtf(d);
            many_f32(q, keys + kv * context * d, d, NULL, p, count, d, seen, 1);
            for (size_t r = 0; r < count; r++) {
                size_t visible = start + at + r + 1;
                softmax(p + r * seen, visible);
                memset(p + r * seen + visible, 0, (seen - visible) * sizeof(float));
            }
            many_f32(p, values + kv * d * far, far, NULL, sum, count, seen, d, 1);
            for (size_t r = 0; r < count; r++) NAME(narrow_all)(sum + r * d, y + ((at + r) * a->heads + h) * d, d);
        }
    }
}
