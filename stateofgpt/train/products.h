/* Matrix products of one precision, small enough that their operands stay in a core's caches. `kernels.c` includes this
   once per type, having defined besides what `kernels.h` asks for

     PAIR               how many numbers along the inner dimension lie in a word of 32 bits: 1, or 2 of bfloat16
     MADD(sum, x, y)    sum + x y of each lane's words, in float
     PUT(p, low, high)  32 floats, rounded, to p
     PAIRED(x, y, out)  32 words out of the 32 numbers from x on and those from y on, in bfloat16

   A product is made of tiles of 8 rows and 32 columns whose sums stay in registers over the whole inner dimension. An
   operand is given by the steps between its words. Sums have one order, whatever the threads. */

/* sums[rows][2] = a [rows, words] times b [words, 32]; ai, ak: from one row of a, and from one of its words, to the next;
   bk: from one row of b to the next. */
static inline __attribute__((always_inline)) void NAME(tile)(lanes (*sums)[2], const int rows, const word *a, int64_t ai,
                                                             int64_t ak, const word *b, int64_t bk, int64_t words) {
    for (int64_t k = 0; k < words; k++) {
        const lanes low = AS_LANES(b + k * bk), high = AS_LANES(b + k * bk + 16);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const lanes x = SPLAT(a[i * ai + k * ak]);
            sums[i][0] = MADD(sums[i][0], x, low);
            sums[i][1] = MADD(sums[i][1], x, high);
        }
    }
}

static inline __attribute__((always_inline)) void NAME(put_tile)(const int rows, const word *a, int64_t ai, const word *b,
                                                                 int64_t bk, int64_t words, const REAL *plus,
                                                                 REAL *out, int64_t step) {
    lanes sums[8][2] = {0};
    NAME(tile)(sums, rows, a, ai, 1, b, bk, words);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        if (plus) {
            sums[i][0] += GET(plus + i * step);
            sums[i][1] += GET(plus + i * step + 16);
        }
        PUT(out + i * step, sums[i][0], sums[i][1]);
    }
}

/* out [m, n] = a [m, words] b [words, n] (+ plus, laid out as out). Rows of a are contiguous, `ai` numbers apart. The 32
   columns of panel p of b begin at b + p * bp. n is a multiple of 32. */
static void NAME(multiply)(const REAL *a, int64_t ai, int64_t m, const word *b, int64_t bk, int64_t bp, int64_t n,
                           int64_t words, const REAL *plus, REAL *out, int64_t step) {
    for (int64_t j = 0; j < n; j += 32) {
        const word *panel = b + j / 32 * bp;
        int64_t i = 0;
        for (; i + 8 <= m; i += 8)
            NAME(put_tile)(8, (const word *)(a + i * ai), ai / PAIR, panel, bk, words, plus ? plus + i * step + j : NULL,
                           out + i * step + j, step);
        for (; i < m; i++)
            NAME(put_tile)(1, (const word *)(a + i * ai), ai / PAIR, panel, bk, words, plus ? plus + i * step + j : NULL,
                           out + i * step + j, step);
    }
}

/* c [8 rows, 32 columns] += a b; n: floats from one row of c to the next. c mostly waits in a farther cache: that of the
   next tile, `ahead`, is asked for. */
static inline __attribute__((always_inline)) void NAME(add_tile)(const word *a, int64_t ai, int64_t ak, const word *b,
                                                                 int64_t bk, int64_t words, float *c, int64_t n,
                                                                 const float *ahead) {
    lanes sums[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __builtin_prefetch(ahead + i * n, 1);
        __builtin_prefetch(ahead + i * n + 16, 1);
        sums[i][0] = *(const lanes *)(c + i * n);
        sums[i][1] = *(const lanes *)(c + i * n + 16);
    }
    NAME(tile)(sums, 8, a, ai, ak, b, bk, words);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        *(lanes *)(c + i * n) = sums[i][0];
        *(lanes *)(c + i * n + 16) = sums[i][1];
    }
}

/* c [m, n] += a [m, words] b [words, n], rows of a `ai` numbers apart, b in panels; m a multiple of 8, n of 32. */
static void NAME(add_product)(const REAL *a, int64_t ai, int64_t m, const word *b, int64_t n, int64_t words, float *c) {
    for (int64_t j = 0; j < n; j += 32)
        for (int64_t i = 0; i < m; i += 8) {
            float *at = c + i * n + j;
            NAME(add_tile)((const word *)(a + i * ai), ai / PAIR, 1, b + j * words, 32, words, at, n,
                           i + 8 < m ? at + 8 * n : c + j + 32);
        }
}

/* c [m, n] += a^T b over `words` rows of words: a [words, m] from down_left, b [words, n] from `down`, `ak` and `bk` words
   from one row to the next. m and n are multiples of 32. The rows are taken WORDS at a time, so that 32 columns of a and
   of b stay in the nearest cache. */
static void NAME(accumulate)(const word *a, int64_t ak, int64_t m, const word *b, int64_t bk, int64_t n, int64_t words,
                             float *c) {
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = 0; j < n; j += 32)
            for (int64_t from = 0; from < words; from += WORDS)
                for (int64_t r = 0; r < 32; r += 8) {
                    float *at = c + (i + r) * n + j;
                    NAME(add_tile)(a + i / 32 * APART(ak, words) + r + from * ak, 1, ak,
                                   b + j / 32 * APART(bk, words) + from * bk, bk, least(WORDS, words - from), at, n,
                                   j + 32 < n ? at + 32 : at + 32 * n - j);
                }
}

/* x [rows, n] with rows `step` apart as words down its columns: panels of 32 columns [(rows + PAIR - 1) / PAIR, 32], each
   `apart` rows of words after the one before. n is a multiple of 32. */
static void NAME(columns)(const REAL *x, int64_t step, int64_t rows, int64_t n, word *out, int64_t apart) {
    for (int64_t p = 0; p < n; p += 32, out += apart * 32)
        for (int64_t k = 0; k < rows; k += PAIR) {
            const REAL *at = x + k * step + p;
            word *to = out + k / PAIR * 32;
            if (PAIR == 1) memcpy(to, at, sizeof(word) * 32);
            else if (k + 1 < rows) PAIRED(at, at + step, to);
            else
                for (int64_t j = 0; j < 32; j++) to[j] = (word)at[j];
        }
}

/* The same, where few columns of float remain where they are, and others lie in `room`. `*to` becomes the words from one
   row to the next, and from one panel to the next there are APART(*to, words). */
static const word *NAME(down)(const REAL *x, int64_t step, int64_t rows, int64_t n, word *room, int64_t *to) {
    if (FEW(n)) return *to = step, (const word *)x;
    NAME(columns)(x, step, rows, n, room, (rows + PAIR - 1) / PAIR);
    return *to = 32, room;
}

/* The same for the left operand of `accumulate`, whose floats can always remain where they are. */
static const word *NAME(down_left)(const REAL *x, int64_t step, int64_t rows, int64_t n, word *room, int64_t *to) {
    if (PAIR == 1) return *to = step, (const word *)x;
    return NAME(down)(x, step, rows, n, room, to);
}

/* Panels first..last of w^T, w [n, k] having its rows `step` apart: out [panel, k / PAIR, 32]; zeros past n. */
static void NAME(panels)(const REAL *w, int64_t step, int64_t n, int64_t k, word *out, int64_t first, int64_t last) {
    const int64_t words = k / PAIR;
    for (int64_t p = first; p < last; p++)
        for (int64_t j = 0; j < 32; j++) {
            const word *row = (const word *)(w + (p * 32 + j) * step);
            word *to = out + p * words * 32 + j;
            for (int64_t i = 0; i < words; i++) to[i * 32] = p * 32 + j < n ? row[i] : 0;
        }
}
