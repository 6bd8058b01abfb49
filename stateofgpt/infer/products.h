/* Vectors, and matrix products whose rows do not depend on each other: each output of each token is summed from the
   first input to the last, whatever stands beside it. Only what gcc and clang understand of vectors is used, but for
   one instruction that multiplies pairs of 16-bit numbers. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define LANES 16 /* floats of a vector; where registers are narrower a compiler makes it of several */
#define PANEL 32 /* outputs of a product that are made together: their weights lie side by side */
#define ROWS 8   /* tokens that are multiplied with a panel at once */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES))); /* twice as many */
typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1)));

enum { FLOAT32, BFLOAT16, INT8 };

typedef struct {
    const void *weight;  /* [panels][inputs][PANEL] in the model's precision; int8: [panels][inputs / 2][PANEL][2] */
    const float *scale;  /* [panels * PANEL] of int8 weights */
    const float *bias;   /* [outputs] or null */
    int64_t outputs, inputs;
} linear;

static inline vec load(const float *p) { return *(const vec_at *)p; }
static inline void store(float *p, vec v) { *(vec_at *)p = v; }

static inline __attribute__((always_inline)) vec weights(const void *w, int64_t at, const int kind) {
    const uint16_t *h = w;
    if (kind == BFLOAT16) return (vec)(__builtin_convertvector(*(const halves *)(h + at), words) << 16);
    return load((const float *)w + at);
}

/* One panel for `rows` tokens: each of the PANEL outputs of each token is summed from the first input to the last. */
static inline __attribute__((always_inline)) void tile(const void *w, const float *x, int64_t ldx, int64_t inputs,
                                                       float *out, const int rows, const int kind) {
    vec sum[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){0};
    for (int64_t k = 0; k < inputs; k++) {
        const vec a = weights(w, k * PANEL, kind), b = weights(w, k * PANEL + LANES, kind);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const float one = x[r * ldx + k];
            sum[r][0] += a * one;
            sum[r][1] += b * one;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        store(out + r * PANEL, sum[r][0]);
        store(out + r * PANEL + LANES, sum[r][1]);
    }
}

#define TILE(rows, kind)                                                                                              \
    static __attribute__((noinline)) void tile_##rows##_##kind(const void *w, const float *x, int64_t ldx,            \
                                                               int64_t inputs, float *out) {                          \
        tile(w, x, ldx, inputs, out, rows, kind);                                                                     \
    }
TILE(8, FLOAT32) TILE(4, FLOAT32) TILE(2, FLOAT32) TILE(1, FLOAT32)
TILE(8, BFLOAT16) TILE(4, BFLOAT16) TILE(2, BFLOAT16) TILE(1, BFLOAT16)

/* sum + the products of 16-bit numbers in pairs: a lane of `w` holds two weights of one output, `x` two inputs. */
static inline ints pairs(ints sum, shorts w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    return sum + (ints)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(x));
#else
    return sum + (((ints)w << 16) >> 16) * (int32_t)(int16_t)x + ((ints)w >> 16) * (x >> 16);
#endif
}

/* The same tile in whole numbers: weights of 8 bits, inputs of 16, sums of 32, which are exact. */
static inline __attribute__((always_inline)) void whole_tile(const void *w, const float *x, int64_t ldx,
                                                             int64_t inputs, float *out, const int rows) {
    ints sum[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (ints){0};
    const bytes *at = w;
    for (int64_t k = 0; k < (inputs + 1) / 2; k++, at += 2) {
        const shorts a = __builtin_convertvector(at[0], shorts), b = __builtin_convertvector(at[1], shorts);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t two;
            memcpy(&two, x + r * ldx + k, sizeof two);
            sum[r][0] = pairs(sum[r][0], a, two);
            sum[r][1] = pairs(sum[r][1], b, two);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        store(out + r * PANEL, __builtin_convertvector(sum[r][0], vec));
        store(out + r * PANEL + LANES, __builtin_convertvector(sum[r][1], vec));
    }
}

#define WHOLE(rows)                                                                                                   \
    static __attribute__((noinline)) void tile_##rows##_INT8(const void *w, const float *x, int64_t ldx,              \
                                                             int64_t inputs, float *out) {                            \
        whole_tile(w, x, ldx, inputs, out, rows);                                                                     \
    }
WHOLE(8) WHOLE(4) WHOLE(2) WHOLE(1)

typedef void (*tiler)(const void *, const float *, int64_t, int64_t, float *);
static const tiler tilers[3][4] = {
    {tile_1_FLOAT32, tile_2_FLOAT32, tile_4_FLOAT32, tile_8_FLOAT32},
    {tile_1_BFLOAT16, tile_2_BFLOAT16, tile_4_BFLOAT16, tile_8_BFLOAT16},
    {tile_1_INT8, tile_2_INT8, tile_4_INT8, tile_8_INT8},
};

/* The inputs of one token as 16-bit numbers, as large as sums of `n` products with 127 allow; what one of them is. */
static float shrink(const float *x, int64_t n, int16_t *to) {
    float most = 0.0f;
    for (int64_t i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    const float room = 2147483000.0f / (127.0f * (float)n), top = room < 32767.0f ? room : 32767.0f;
    const float rate = most > 0.0f ? top / most : 0.0f;
    for (int64_t i = 0; i < n; i++) to[i] = (int16_t)nearbyintf(x[i] * rate);
    if (n % 2) to[n] = 0;
    return most / top;
}

/* y [n][ldy] = x [n][ldx] times w, or y + that; by all threads of the team, who wait for each other at the end. `spare`
   has room for (inputs / 2 + 2) floats of each token. */
static void product(const linear *w, int64_t kind, const float *x, int64_t ldx, int64_t n, float *y, int64_t ldy,
                    int added, float *spare) {
    const int64_t panels = (w->outputs + PANEL - 1) / PANEL;
    const int64_t size = (w->inputs + (kind == INT8 && w->inputs % 2)) * PANEL;
    const int64_t width = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
    float *rates = spare;
    if (kind == INT8) {
        const int64_t ld = w->inputs / 2 + 1;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < n; t++) rates[t] = shrink(x + t * ldx, w->inputs, (int16_t *)(spare + n + t * ld));
        x = spare + n;
        ldx = ld;
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        const char *panel = (const char *)w->weight + p * size * width;
        const int64_t first = p * PANEL, here = w->outputs - first < PANEL ? w->outputs - first : PANEL;
        float out[ROWS * PANEL];
        for (int64_t row = 0; row < n;) {
            const int power = n - row >= 8 ? 3 : n - row >= 4 ? 2 : n - row >= 2 ? 1 : 0, rows = 1 << power;
            tilers[kind][power](panel, x + row * ldx, ldx, w->inputs, out);
            for (int r = 0; r < rows; r++) {
                float *to = y + (row + r) * ldy + first, *from = out + r * PANEL;
                if (kind == INT8)
                    for (int64_t i = 0; i < here; i++) from[i] *= w->scale[first + i] * rates[row + r];
                if (w->bias)
                    for (int64_t i = 0; i < here; i++) from[i] += w->bias[first + i];
                if (added)
                    for (int64_t i = 0; i < here; i++) to[i] += from[i];
                else
                    memcpy(to, from, here * sizeof(float));
            }
            row += rows;
        }
    }
}
