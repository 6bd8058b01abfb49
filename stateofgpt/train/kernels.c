/* What lies between the matrix products of a training step, fused: each of these passes over its numbers once where
   separate tensor operations pass four to ten times. `kernels.py` compiles this file, and calls it only after it has
   agreed with torch on that machine; `kernels.h` has the functions, once per precision. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* e^x to 2 ulp for x in [-87, 88], 0 below; written so that compilers turn loops over it into vector code. NaN stays. */
static inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x;
    const float n = nearbyintf(low * 1.44269504088896f);
    float r = low - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union {
        int32_t i;
        float f;
    } two;
    const float m = n > 127.0f ? 127.0f : n;
    two.i = ((int32_t)m + 127) << 23;
    return x < -87.0f ? 0.0f : (x != x ? x : p * two.f);
}

/* e[n] becomes exp((e - top) scale), and their sum is given back. */
static inline float exponentials(float *e, int64_t n, float top, float scale) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum) /* without it two loops were vector code, and one that both writes and sums was not */
    for (int64_t j = 0; j < n; j++) {
        e[j] = exponential((e[j] - top) * scale);
        sum += e[j];
    }
    return sum;
}

typedef uint16_t bfloat16;

static inline float from_bfloat16(bfloat16 v) {
    union {
        uint32_t i;
        float f;
    } u;
    u.i = (uint32_t)v << 16;
    return u.f;
}

static inline bfloat16 to_bfloat16(float v) {
    union {
        float f;
        uint32_t i;
    } u;
    u.f = v;
    const uint32_t rounded = (u.i + 0x7fffu + ((u.i >> 16) & 1u)) >> 16;
    return v != v ? 0x7fc0 : (bfloat16)rounded;
}

/* Functions of one row: with a copy in each place that calls them the compiler took half as long again. */
#define ROW static __attribute__((noinline))

/* The rows first..last of n that are this thread's, and which thread it is. */
static inline int64_t share(int64_t n, int64_t *first, int64_t *last) {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    *first = n * me / all;
    *last = n * (me + 1) / all;
    return me;
}

#ifdef __AVX512F__ /* products of our own, and chains of passes over few tokens at a time */
#include <immintrin.h>
#define QUERIES 32 /* that attend together: `kernels.py` knows this too */
#define TOKENS 64 /* that go through a chain of passes together */

typedef uint32_t __attribute__((may_alias)) word;
typedef float __attribute__((vector_size(64), aligned(4), may_alias)) lanes;
#define AS_LANES(p) (*(const lanes *)(p))
#define WORDS 64 /* along a product's inner dimension that `accumulate` takes together */
#define APART(to, words) ((to) == 32 ? (words) * 32 : 32) /* from one panel of what `down` gave to the next */
#define FEW(n) (PAIR == 1 && (n) < 256) /* columns of float that a product reads as fast where they are */
#define SOME(mask, v) ((lanes)_mm512_maskz_mov_ps((__mmask16)(mask), (__m512)(v))) /* and zeros */
#define WITHIN(v, most) (_mm512_cmp_ps_mask((__m512)(v), _mm512_set1_ps(most), _CMP_LE_OQ) == 0xffff)
#define SPLAT(w) ((lanes)_mm512_set1_epi32((int)(w)))

/* e^x to 3 ulp where x is within 15 of 0, to 11 at -87, below what it is there: 2^n times a polynomial that is exactly 1
   at 0. */
static inline lanes exponential_lanes(lanes x) {
    x = (lanes)_mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x);
    const lanes n = (lanes)_mm512_roundscale_ps((__m512)(x * 1.44269504088896f), _MM_FROUND_TO_NEAREST_INT);
    const lanes r = x * 1.44269504088896f - n;
    lanes p = r * 1.3264727e-3f + 9.6715130e-3f;
    p = p * r + 5.5507336e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314700e-1f;
    return (lanes)_mm512_scalef_ps((__m512)(p * r + 1.0f), (__m512)n);
}

/* 1 / (1 + e^-x) to a few ulp, by an estimate of 14 bits and one step of Newton's. */
static inline lanes sigmoid_lanes(lanes x) {
    const lanes most = (lanes)_mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)-x); /* past it the estimate would be 0 */
    const lanes below = 1.0f + exponential_lanes(most), y = (lanes)_mm512_rcp14_ps((__m512)below);
    return y + y * (1.0f - below * y);
}

/* Both for results that are rounded to bfloat16: e^x to 6e-6, by a shorter polynomial, and 1 / (1 + e^-x) to 14 bits. */
static inline lanes exponential_near(lanes x) {
    x = (lanes)_mm512_max_ps(_mm512_set1_ps(-87.0f), (__m512)x);
    const lanes n = (lanes)_mm512_roundscale_ps((__m512)(x * 1.44269504088896f), _MM_FROUND_TO_NEAREST_INT);
    const lanes r = x - n * 0.69314718056f, p = (r * 4.127774815e-2f + 1.675351401e-1f) * r + 5.000511602e-1f;
    return (lanes)_mm512_scalef_ps((__m512)(p * r * r + r + 1.0f), (__m512)n);
}

static inline lanes sigmoid_near(lanes x) {
    const lanes most = (lanes)_mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)-x);
    return (lanes)_mm512_rcp14_ps((__m512)(1.0f + exponential_near(most)));
}

/* 32 words of x's numbers in their lower halves and y's in their upper ones. */
static inline void in_pairs(const uint16_t *x, const uint16_t *y, word *out) {
    const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
    const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i first = _mm512_or_si512(each, _mm512_slli_epi32(_mm512_add_epi32(each, _mm512_set1_epi32(32)), 16));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(a, _mm512_add_epi32(first, _mm512_set1_epi32(0x100010)), b));
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t upto32(int64_t n) { return (n + 31) / 32 * 32; }

/* Memory that begins at a multiple of 64. Not aligned_alloc's: that of glibc hands out what lies before such a place, and
   once somebody has it what is given back is too small for the next call, which then takes as much again. */
static void *room_for(int64_t bytes) {
    char *all = malloc((size_t)bytes + 64);
    if (!all) {
        fprintf(stderr, "error: there is no memory for %lld MB more; take a smaller model or fewer rows\n",
                (long long)bytes >> 20);
        abort();
    }
    void **room = (void **)(all + 64 - (uintptr_t)all % 64);
    room[-1] = all;
    return room;
}

static void give_back(void *room) {
    if (room) free(((void **)room)[-1]);
}

/* The address *at, after which `bytes` are taken. */
static uintptr_t take(uintptr_t *at, int64_t bytes) {
    const uintptr_t here = *at;
    *at += (uintptr_t)(bytes + 63) / 64 * 64;
    return here;
}

/* What all blocks of a decoder share: B rows of T tokens, C hidden numbers, H heads of queries and K of keys and values
   with D numbers each, I numbers in the feed-forward, L layers; the tables and masks of `rope_forward` and
   `softmax_forward`. Of row b the probabilities of a head are of_row[b], those of a head of all rows before it
   before_row[b]. */
typedef struct {
    int64_t B, T, C, H, K, D, I, L;
    float eps;
    const float *cosines, *sines;
    const int64_t *positions;
    const int32_t *firsts, *shared;
    int64_t *of_row, *before_row;
} Shape;

/* A layer's weights, as `model/gpt.py` has them; the gains of query and key heads may be null. */
typedef struct {
    const float *norm, *q, *k, *v, *q_norm, *k_norm, *o, *norm_mlp, *gate, *up, *down;
} Layer;

static inline int64_t all_heads(const Shape *s) { return (s->H + 2 * s->K) * s->D; }
static inline int64_t of_matrices(const Shape *s) { return s->C * (all_heads(s) + s->H * s->D + 3 * s->I); }

/* sizes: B, T, C, H, K, D, I, L. rows [2 B]: room for of_row and before_row. */
static Shape shape_of(const int64_t *sizes, float eps, const float *cosines, const float *sines, const int64_t *positions,
                      const int32_t *firsts, const int32_t *shared, int64_t *rows) {
    return (Shape){sizes[0], sizes[1], sizes[2],  sizes[3],  sizes[4], sizes[5],        sizes[6], sizes[7],
                   eps,      cosines,  sines,     positions, firsts,   shared,          rows,     rows + sizes[0]};
}

/* The place of the first of n ids that is none of the vocabulary's, or -1. */
static int64_t unknown(const int64_t *ids, int64_t n, int64_t vocabulary) {
    int64_t seen = 0;
    for (int64_t i = 0; i < n; i++) seen |= ids[i] < 0 || ids[i] >= vocabulary;
    for (int64_t i = 0; seen && i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocabulary) return i;
    return -1;
}

/* Which keys the scores of the `rows` queries from `from` on have a column for: the first `shared` and then those from
   `from` to `end`; together `width`. All are multiples of 32. */
typedef struct {
    int64_t rows, shared, from, end, width;
} Seen;

static Seen seen_by(const Shape *s, int64_t b, int64_t from) {
    const int64_t rows = least(QUERIES, s->T - from), end = upto32(from + rows);
    int64_t shared = 0, first = s->firsts ? s->T : 0;
    for (int64_t t = b * s->T + from; t < b * s->T + from + rows; t++) {
        if (s->firsts) first = least(first, s->firsts[t]);
        if (s->shared && s->shared[t] > shared) shared = s->shared[t];
    }
    shared = upto32(shared), first = first / 32 * 32;
    if (shared >= first) shared = first = 0;
    return (Seen){rows, shared, first, end, shared + end - first};
}

/* Fill of_row and before_row [B]; how many probabilities a head of all rows has. */
static int64_t count_probabilities(const Shape *s) {
    int64_t all = 0;
    for (int64_t b = 0; b < s->B; b++) {
        s->before_row[b] = all, s->of_row[b] = 0;
        for (int64_t from = 0; from < s->T; from += QUERIES) {
            const Seen seen = seen_by(s, b, from);
            s->of_row[b] += seen.rows * seen.width;
        }
        all += s->of_row[b];
    }
    return all;
}

/* sums [size] += those of the other threads, in order; called by all of them. */
static void add_up(float *sums, const float *others, int64_t size) {
#pragma omp barrier
    int64_t first, last;
    share(size, &first, &last);
    for (int64_t t = 0; t + 1 < omp_get_num_threads(); t++)
        for (int64_t i = first; i < last; i++) sums[i] += others[t * size + i];
}
#endif

#define REAL float
#define NAME(f) f##_float32
#define LOAD(v) (v)
#define STORE(v) (v)
#include "kernels.h"
#ifdef __AVX512F__
#define PAIR 1
#define MADD(sum, x, y) ((sum) + (x) * (y))
#define EXP exponential_lanes
#define SIGMOID sigmoid_lanes
#define PAIRED(x, y, out) ((void)(x), (void)(y), (void)(out))
#define GET(p) (*(const lanes *)(p))
#define PUT(p, low, high) (*(lanes *)(p) = (low), *(lanes *)((p) + 16) = (high))
#include "lanes.h"
#include "products.h"
#include "tiles.h"
#include "head.h"
#include "trunk.h"
int tiles_float32(void) { return 1; }
#undef PAIR
#undef MADD
#undef EXP
#undef SIGMOID
#undef PAIRED
#undef GET
#undef PUT
#undef BLOCK
#undef ROWS
#undef LARGEST
#undef SMALL
#endif
#undef REAL
#undef NAME
#undef LOAD
#undef STORE

#define REAL bfloat16
#define NAME(f) f##_bfloat16
#define LOAD(v) from_bfloat16(v)
#define STORE(v) to_bfloat16(v)
#include "kernels.h"
#if defined __AVX512BF16__ && defined __AVX512F__ && !defined __AMX_BF16__ /* with AMX torch's products are faster */
#define PAIR 2
#define MADD(sum, x, y) ((lanes)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(x), (__m512bh)(y)))
#define EXP exponential_near
#define SIGMOID sigmoid_near
#define PAIRED(x, y, out) in_pairs(x, y, out)
#define GET(p) ((lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define PUT(p, low, high) _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)(high), (__m512)(low)))
#include "lanes.h"
#include "products.h"
#include "tiles.h"
#include "head.h"
#include "trunk.h"
int tiles_bfloat16(void) { return 1; }
#endif

/* One AdamW step (arXiv 1711.05101) over `count` tensors of n[] numbers, with cautious weight decay (arXiv 2411.16085): it
   acts only where update and weight agree in sign. first, second: the moments; correction1, correction2: 1 - beta^t. */
void adamw(float **ps, const float **gs, float **firsts, float **seconds, const int64_t *n, const float *decays,
           int64_t count, float lr, float beta1, float beta2, float eps, float correction1, float correction2, float clip,
           int threads) {
    const float rate1 = 1.0f / correction1, rate2 = 1.0f / correction2;
#pragma omp parallel num_threads(threads)
    for (int64_t k = 0; k < count; k++) {
        float *restrict p = ps[k], *restrict first = firsts[k], *restrict second = seconds[k];
        const float *restrict g = gs[k], decay = decays[k];
        int64_t from, to;
        share(n[k], &from, &to);
        for (int64_t i = from; i < to; i++) {
            const float d = g[i] * clip;
            const float m = first[i] = first[i] + (d - first[i]) * (1.0f - beta1);
            const float v = second[i] = second[i] * beta2 + d * d * (1.0f - beta2);
            const float update = m * rate1 / (sqrtf(v * rate2) + eps);
            const float shrink = update * p[i] > 0.0f ? lr * decay * p[i] : 0.0f;
            p[i] = p[i] - shrink - lr * update;
        }
    }
}

/* Sums of the squares of `count` tensors of sizes[] numbers: one of each thread, in double past 1024 numbers. */
void squares(const float **xs, const int64_t *sizes, double *sums, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
    {
        double total = 0.0;
        for (int64_t k = 0; k < count; k++) {
            int64_t from, to;
            share(sizes[k], &from, &to);
            for (; from < to; from += 1024) {
                const int64_t n = to - from < 1024 ? to - from : 1024;
                const float *x = xs[k] + from;
                float sum = 0.0f;
                for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
                total += sum;
            }
        }
        sums[omp_get_thread_num()] = total;
    }
}

/* Muon before its iteration: momentum = lerp(momentum, gradient), and the Nesterov update as bfloat16. */
void muon_momentum(const float *g, float *momentum, bfloat16 *update, int64_t n, float beta, float clip, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float d = g[i] * clip;
        const float m = momentum[i] = momentum[i] + (d - momentum[i]) * (1.0f - beta);
        update[i] = to_bfloat16(d + (m - d) * beta);
    }
}

/* Muon after its iteration: cautious decay, then the step. */
void muon_apply(float *p, const bfloat16 *update, int64_t n, float lr, float decay, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float u = from_bfloat16(update[i]);
        const float shrink = u * p[i] > 0.0f ? lr * decay * p[i] : 0.0f;
        p[i] = p[i] - shrink - lr * u;
    }
}

#if defined __AVX512BF16__ && defined __AVX512F__ && !defined __AMX_BF16__
/* c [n, n] = a a^T, a [n, k]: the half below the diagonal, and then the other from it. panels [n, k]: room. */
static void squared(const bfloat16 *a, int64_t n, int64_t k, word *panels, bfloat16 *c) {
    panels_bfloat16(a, k, n, k, panels, 0, n / 32);
    for (int64_t j = 0; j < n; j += 32)
        multiply_bfloat16(a + j * k, k, n - j, panels + j * k / 2, 32, 0, 32, k / 2, NULL, c + j * n + j, n);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = i / 32 * 32 + 32; j < n; j++) c[i * n + j] = c[j * n + i];
}

/* Muon's iteration on `count` matrices [rows, columns], in place, a thread for each: divided by a little more than its
   norm, x becomes a x + (b x x^T + c (x x^T)^2) x for each a, b, c of `steps`. What is kept is x without a factor known
   exactly, so that each step rounds x once. Tall matrices are transposed. Both sides are multiples of 32. */
void polar(bfloat16 *matrices, int64_t count, int64_t rows, int64_t columns, const float *coefficients, int64_t steps,
           int threads) {
    const int64_t r = least(rows, columns), c = rows + columns - r, down = rows > columns ? 1 : columns;
    const int64_t on = rows > columns ? columns : 1;
#pragma omp parallel num_threads(threads)
    {
        bfloat16 *x = room_for(sizeof(bfloat16) * 2 * r * (c + r)), *y = x + r * c, *gram = y + r * c, *second = gram + r * r;
        word *room = room_for(sizeof(bfloat16) * r * c);
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < count; k++) {
            bfloat16 *own = matrices + k * rows * columns;
            float sum = 0.0f;
            for (int64_t i = 0; i < r * c; i++) sum += from_bfloat16(own[i]) * from_bfloat16(own[i]);
            const float norm = sqrtf(sum);
            int exponent;
            frexpf(norm, &exponent);
            const float unit = ldexpf(1.0f, -exponent);
            float factor = 1.0f / (unit * (norm * 1.01f + 1e-7f));
            for (int64_t i = 0; i < r; i++)
                for (int64_t j = 0; j < c; j++) x[i * c + j] = to_bfloat16(from_bfloat16(own[i * down + j * on]) * unit);
            for (int64_t step = 0; step < steps; step++) {
                const float *abc = coefficients + 3 * step, f2 = factor * factor;
                const float b = abc[1] / abc[0] * f2, d = abc[2] / abc[0] * f2 * f2;
                squared(x, r, c, room, gram);
                squared(gram, r, r, room, second);
                for (int64_t i = 0; i < r * r; i++)
                    gram[i] = to_bfloat16(b * from_bfloat16(gram[i]) + d * from_bfloat16(second[i]));
                int64_t to;
                const word *words = down_bfloat16(x, c, r, c, room, &to);
                multiply_bfloat16(gram, r, r, words, to, APART(to, r / 2), c, r / 2, x, y, c);
                bfloat16 *last = x;
                x = y, y = last;
                factor *= abc[0];
            }
            for (int64_t i = 0; i < r; i++)
                for (int64_t j = 0; j < c; j++) own[i * down + j * on] = to_bfloat16(from_bfloat16(x[i * c + j]) * factor);
        }
        give_back(room);
        give_back(x < y ? x : y);
    }
}
#endif
