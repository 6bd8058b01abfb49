/* The forward pass of a decoder for tokens whose past is in a cache, in one call: from ids to logits.

   Every number of a token is computed from that token and its own past in an order that nothing else changes: a matrix
   product adds up its terms from the first to the last for each output, whatever stands beside it in the batch, and
   attention goes over the past from the first position on. A token therefore has the same bits alone, in any batch, in
   a long prompt read at once or in pieces, and with any number of threads. `forward.py` calls this file, after it
   has agreed with torch on the machine. */

#include "products.h"

#define BLOCK 16 /* positions of the cache that lie together */

typedef struct {
    linear qkv, out, up, down;
    const float *norm_in, *shift_in, *norm_mlp, *shift_mlp; /* shifts where the norms are LayerNorms */
    const float *qk_gain;                                   /* [heads + kv_heads][head_dim] or null */
} layer;

typedef struct {
    linear head;
    const layer *layers;
    const float *embed, *places;  /* [vocab][hidden]; [context][hidden] or null */
    const float *norm, *shift;
    const float *cosines, *sines; /* [context][head_dim / 2] or null */
    int64_t n_layers, hidden, heads, kv_heads, head_dim, inner, kind, gated;
    float eps, scale;
    int64_t cache; /* kind of its numbers: FLOAT32 or BFLOAT16 */
} model;

static inline float total(vec v) {
    float s[LANES];
    memcpy(s, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

static inline float largest(vec v) {
    float s[LANES], m;
    memcpy(s, &v, sizeof v);
    m = s[0];
    for (int i = 1; i < LANES; i++) m = s[i] > m ? s[i] : m;
    return m;
}

/* e^x to 2 ulp for x in [-87, 0], 0 below. */
static inline vec exponential(vec x) {
    const vec zero = {0}, low = zero - 87.0f;
    const ints tiny = x < low;
    x = (vec)(((ints)x & ~tiny) | ((ints)low & tiny));
    const vec magic = zero + 12582912.0f; /* adding it rounds to a whole number */
    const vec t = x * 1.44269504088896f + magic;
    const vec n = t - magic;
    vec r = x - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints two = (((ints)t - (ints)magic) + 127) << 23;
    return (vec)((ints)(p * (vec)two) & ~tiny);
}

/* ---- norms and rotation ---- */

static inline float squares(const float *x, int64_t n, float mean) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec d = load(x + i) - mean;
        sum += d * d;
    }
    float s = total(sum);
    for (; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
    return s;
}

/* RMSNorm, or LayerNorm where there is a shift. */
static void normalise(const float *x, const float *gain, const float *shift, float *y, int64_t n, float eps) {
    float mean = 0.0f;
    if (shift) {
        vec sum = {0};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sum += load(x + i);
        mean = total(sum);
        for (; i < n; i++) mean += x[i];
        mean /= (float)n;
    }
    const float rate = 1.0f / sqrtf(squares(x, n, mean) / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * rate * gain[i];
    if (shift)
        for (int64_t i = 0; i < n; i++) y[i] += shift[i];
}

/* Queries and keys of one token, normalised and turned in place. */
static void turn(const model *m, const layer *l, float *qk, int64_t position) {
    const int64_t d = m->head_dim, half = d / 2;
    for (int64_t h = 0; h < m->heads + m->kv_heads; h++, qk += d) {
        if (l->qk_gain) {
            const float rate = 1.0f / sqrtf(squares(qk, d, 0.0f) / (float)d + m->eps);
            for (int64_t i = 0; i < d; i++) qk[i] = qk[i] * rate * l->qk_gain[h * d + i];
        }
        if (m->cosines) {
            const float *c = m->cosines + position * half, *s = m->sines + position * half;
            for (int64_t i = 0; i < half; i++) {
                const float a = qk[i], b = qk[i + half];
                qk[i] = a * c[i] - b * s[i];
                qk[i + half] = b * c[i] + a * s[i];
            }
        }
    }
}

/* ---- attention ---- */

/* The cache is blocks of BLOCK positions; a block has for each layer and key head its keys as [head_dim][BLOCK] and its
   values as [BLOCK][padded], where padded is head_dim rounded up to whole vectors. All in the cache's kind of numbers,
   of which a block has a whole number of floats. */
static inline int64_t padded(const model *m) { return (m->head_dim + LANES - 1) / LANES * LANES; }
static inline int64_t piece(const model *m) {
    return BLOCK * (m->head_dim + padded(m)) / (m->cache == BFLOAT16 ? 2 : 1);
}

static inline float *place(const model *m, float *pool, int64_t block, int64_t index, int64_t head) {
    return pool + ((block * m->n_layers + index) * m->kv_heads + head) * piece(m);
}

/* The upper half of a float, rounded to the nearest, halves to even. */
static inline uint16_t half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void remember(const model *m, float *pool, int64_t block, int64_t index, int64_t slot, const float *k,
                     const float *v) {
    const int64_t d = m->head_dim, wide = padded(m);
    for (int64_t h = 0; h < m->kv_heads; h++, k += d, v += d) {
        float *keys = place(m, pool, block, index, h), *values = keys + BLOCK * d;
        if (m->cache == BFLOAT16) {
            uint16_t *small = (uint16_t *)keys;
            for (int64_t i = 0; i < d; i++) small[i * BLOCK + slot] = half(k[i]);
            for (int64_t i = 0; i < d; i++) small[BLOCK * d + slot * wide + i] = half(v[i]);
            continue;
        }
        for (int64_t i = 0; i < d; i++) keys[i * BLOCK + slot] = k[i];
        memcpy(values + slot * wide, v, d * sizeof(float));
    }
}

/* What one query head of one token finds in its past of `length` positions. scores has room for length, rounded up to
   whole blocks. */
static inline __attribute__((always_inline)) void attend(const model *m, float *pool, const int32_t *blocks,
                                                         int64_t index, int64_t head, int64_t length, const float *q,
                                                         float *scores, float *y, const int kind) {
    const int64_t d = m->head_dim, wide = padded(m), n = (length + BLOCK - 1) / BLOCK;
    vec top = (vec){0} - INFINITY, sum = {0};
    for (int64_t b = 0; b < n; b++) {
        const void *keys = place(m, pool, blocks[b], index, head);
        vec s[4] = {{0}, {0}, {0}, {0}};
        int64_t i = 0;
        for (; i + 4 <= d; i += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) s[j] += weights(keys, (i + j) * BLOCK, kind) * q[i + j];
        for (; i < d; i++) s[0] += weights(keys, i * BLOCK, kind) * q[i];
        vec all = ((s[0] + s[1]) + (s[2] + s[3])) * m->scale;
        if (b == n - 1)
            for (int64_t j = length - b * BLOCK; j < BLOCK; j++) all[j] = -INFINITY;
        store(scores + b * BLOCK, all);
        const ints larger = all > top;
        top = (vec)(((ints)all & larger) | ((ints)top & ~larger));
    }
    const float most = largest(top);
    for (int64_t b = 0; b < n; b++) {
        const vec e = exponential(load(scores + b * BLOCK) - most);
        store(scores + b * BLOCK, e);
        sum += e;
    }
    const float rate = 1.0f / total(sum);
    for (int64_t at = 0; at < wide; at += 4 * LANES) {
        const int parts = (wide - at) / LANES < 4 ? (int)((wide - at) / LANES) : 4;
        vec out[4] = {{0}, {0}, {0}, {0}};
        for (int64_t b = 0; b < n; b++) {
            const void *values = place(m, pool, blocks[b], index, head);
            const int64_t here = length - b * BLOCK < BLOCK ? length - b * BLOCK : BLOCK;
            if (parts == 4)
                for (int64_t t = 0; t < here; t++) {
                    const float p = scores[b * BLOCK + t];
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++)
                        out[j] += weights(values, BLOCK * d + at + t * wide + j * LANES, kind) * p;
                }
            else
                for (int64_t t = 0; t < here; t++)
                    for (int j = 0; j < parts; j++)
                        out[j] += weights(values, BLOCK * d + at + t * wide + j * LANES, kind) *
                                  scores[b * BLOCK + t];
        }
        for (int j = 0; j < parts; j++) {
            const vec o = out[j] * rate;
            const int64_t from = at + j * LANES, size = d - from < LANES ? d - from : LANES;
            memcpy(y + from, &o, size * sizeof(float));
        }
    }
}

#define ATTEND(kind)                                                                                                  \
    static __attribute__((noinline)) void attend_##kind(const model *m, float *pool, const int32_t *blocks,           \
                                                        int64_t index, int64_t head, int64_t length, const float *q,  \
                                                        float *scores, float *y) {                                    \
        attend(m, pool, blocks, index, head, length, q, scores, y, kind);                                             \
    }
ATTEND(FLOAT32) ATTEND(BFLOAT16)

/* ---- the pass ---- */

/* silu(gate) * up in place of the gate, or GELU in its tanh approximation where there is no gate. */
static void activate(float *x, int64_t n, int64_t gated) {
    const vec one = (vec){0} + 1.0f;
    for (int64_t i = 0; i < n; i += LANES) {
        float g[LANES] = {0}, u[LANES] = {0};
        const int64_t here = n - i < LANES ? n - i : LANES;
        memcpy(g, x + i, here * sizeof(float));
        if (gated) memcpy(u, x + n + i, here * sizeof(float));
        const vec a = load(g);
        const vec z = gated ? a : (a + a * a * a * 0.044715f) * 1.5957691216057308f;
        const ints negative = z < 0.0f; /* e^-|z|, so that nothing overflows: 1 / (1 + e) or e / (1 + e) */
        const vec e = exponential((vec)((ints)z | INT32_MIN));
        const vec top = (vec)(((ints)e & negative) | ((ints)one & ~negative));
        vec out = a * (top / (one + e));
        if (gated) out *= load(u);
        memcpy(x + i, &out, here * sizeof(float));
    }
}

/* How many floats of scratch a pass of n tokens with pasts of at most `longest` positions needs. */
int64_t scratch_floats(const model *m, int64_t n, int64_t longest, int threads) {
    const int64_t qkv = (m->heads + 2 * m->kv_heads) * m->head_dim, up = m->inner * (m->gated ? 2 : 1);
    const int64_t wide = m->heads * m->head_dim > m->hidden ? m->heads * m->head_dim : m->hidden;
    const int64_t inputs = m->inner > wide ? m->inner : wide;
    return n * (m->hidden + wide + (qkv > up ? qkv : up) + inputs / 2 + 2) + threads * (longest + BLOCK);
}

/* How many floats a block of the cache has. */
int64_t block_floats(const model *m) { return m->n_layers * m->kv_heads * piece(m); }

/* Read n tokens: ids, their positions, and for each where the blocks of its row begin in `tables`. Tokens of a row must
   stand in the order of their positions. Of the n_wanted tokens `wanted` come logits [n_wanted][vocab] or, where
   `logits` is null, final hidden states [n_wanted][hidden] into `states`. */
void forward(const model *m, float *pool, const int64_t *ids, const int64_t *positions, const int64_t *rows,
             const int32_t *tables, int64_t n, const int64_t *wanted, int64_t n_wanted, float *logits, float *states,
             float *scratch, int64_t longest, int threads) {
    const int64_t c = m->hidden, d = m->head_dim, y_width = m->heads * d;
    const int64_t qkv_width = y_width + 2 * m->kv_heads * d, up_width = m->inner * (m->gated ? 2 : 1);
    const int64_t wide = y_width > c ? y_width : c, group = m->heads / m->kv_heads;
    float *x = scratch, *h = x + n * c, *u = h + n * wide;
    float *spare = u + n * (qkv_width > up_width ? qkv_width : up_width);
    float *scores = spare + n * ((m->inner > wide ? m->inner : wide) / 2 + 2);
#pragma omp parallel num_threads(threads)
    {
        float *own = scores + omp_get_thread_num() * (longest + BLOCK);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) {
            memcpy(x + t * c, m->embed + ids[t] * c, c * sizeof(float));
            if (m->places)
                for (int64_t i = 0; i < c; i++) x[t * c + i] += m->places[positions[t] * c + i];
        }
        int64_t index = 0;
        for (; index < m->n_layers; index++) {
            const layer *l = m->layers + index;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) normalise(x + t * c, l->norm_in, l->shift_in, h + t * wide, c, m->eps);
            product(&l->qkv, m->kind, h, wide, n, u, qkv_width, 0, spare);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) {
                float *qkv = u + t * qkv_width;
                turn(m, l, qkv, positions[t]);
                remember(m, pool, tables[rows[t] + positions[t] / BLOCK], index, positions[t] % BLOCK, qkv + y_width,
                         qkv + y_width + m->kv_heads * d);
            }
            if (index == m->n_layers - 1 && n_wanted == 0) break; /* the rest would only be needed for logits */
#pragma omp for schedule(dynamic, 4)
            for (int64_t job = 0; job < n * m->heads; job++) {
                const int64_t t = job % n, head = job / n; /* tokens of one text read the same past */
                (m->cache == BFLOAT16 ? attend_BFLOAT16 : attend_FLOAT32)(
                    m, pool, tables + rows[t], index, head / group, positions[t] + 1, u + t * qkv_width + head * d, own,
                    h + t * wide + head * d);
            }
            product(&l->out, m->kind, h, wide, n, x, c, 1, spare);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) normalise(x + t * c, l->norm_mlp, l->shift_mlp, h + t * wide, c, m->eps);
            product(&l->up, m->kind, h, wide, n, u, up_width, 0, spare);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n; t++) activate(u + t * up_width, m->inner, m->gated);
            product(&l->down, m->kind, u, up_width, n, x, c, 1, spare);
        }
        if (n_wanted) {
            float *to = logits ? h : states;
            const int64_t ld = logits ? wide : c;
#pragma omp for schedule(static)
            for (int64_t t = 0; t < n_wanted; t++)
                normalise(x + wanted[t] * c, m->norm, m->shift, to + t * ld, c, m->eps);
            if (logits) product(&m->head, m->kind, h, wide, n_wanted, logits, m->head.outputs, 0, spare);
        }
    }
}
