/* The head of a decoder and its loss, of one precision, for any vocabulary: logits become exponentials in the product that
   makes them, and are never divided by their sum. `kernels.c` includes this once per type, after `products.h`.

   The vocabulary is shared among the threads, so that the gradient of its weights need not be kept once for each. ROWS
   tokens are taken together, for which that gradient, larger than any cache maybe, comes and goes once. BLOCK words of the
   vocabulary at a time meet 64 tokens at a time: their exponentials, relative to the logit of the target, are used at once
   for the gradient of x and kept for that of the weights. When all words have been seen, what is missing is one factor per
   token: for the gradient of x, and for the normalised x that the exponentials are multiplied with. The target itself,
   whose gradient is a small difference where the model is sure, is left out of these products and added in float. */

#define BLOCK (128 * PAIR)
#define ROWS 512
#define SMALL (1 << 19) /* weights, whose gradient stays near: then fewer tokens at a time, and their exponentials do too */
#define LARGEST 1e20f /* that a sum of exponentials may become */

/* What one thread has of the vocabulary and of the tokens. */
typedef struct {
    int64_t C, first, padded, words; /* hidden numbers; first word of the vocabulary; tokens, as numbers and as words */
    word *across, *beside; /* the weights by panels of the vocabulary, and by panels of C in each block (float: in one) */
    const REAL *h;         /* normalised x [ROWS, C] */
    float *reference, *dx; /* what exponentials are relative to [ROWS]; gradient of x without its factor [ROWS, C] */
    lanes *sums;           /* of exponentials [ROWS] */
    word *kept;            /* exponentials, down their columns */
} NAME(Part);

/* out [m, step] = exp(logit - reference) for tokens row..row+m-1 and n words of the vocabulary from `from` on, of which
   `valid` are there; their sums are added to s->sums. m is a multiple of 8. */
static void NAME(likelihoods)(const NAME(Part) *s, int64_t row, int64_t m, int64_t from, int64_t n, int64_t valid,
                               REAL *out, int64_t step) {
    const int64_t words = s->C / PAIR;
    for (int64_t j = 0; j < n; j += 32) {
        const word *panel = s->across + (from + j) * words;
        const uint32_t there = valid - j >= 32 ? ~0u : (1u << (valid - j)) - 1;
        for (int64_t i = 0; i < m; i += 8) {
            lanes tile[8][2] = {0};
            NAME(tile)(tile, 8, (const word *)(s->h + (row + i) * s->C), words, 1, panel, 32, words);
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const float reference = s->reference[row + i + r];
                const lanes low = SOME(there, EXP(tile[r][0] - reference));
                const lanes high = SOME(there >> 16, EXP(tile[r][1] - reference));
                s->sums[row + i + r] += low + high;
                PUT(out + (i + r) * step + j, low, high);
            }
        }
    }
}

/* Another reference for a token whose sum has become too large: its largest logit among these words. What is there of it
   from the words before is made relative to that; `before`: their sum. */
static void NAME(raise)(const NAME(Part) *s, int64_t row, int64_t from, int64_t valid, lanes before) {
    const int64_t words = s->C / PAIR;
    float most = -INFINITY;
    for (int64_t j = 0; j < valid; j += 32) {
        lanes tile[1][2] = {0};
        NAME(tile)(tile, 1, (const word *)(s->h + row * s->C), words, 1, s->across + (from + j) * words, 32, words);
        for (int64_t i = 0; i < least(32, valid - j); i++) most = fmaxf(most, tile[0][i / 16][i % 16]);
    }
    const float factor = expf(s->reference[row] - most);
    s->reference[row] = most;
    s->sums[row] = before * factor;
    if (!s->dx) return;
    for (int64_t j = 0; j < s->C; j++) s->dx[row * s->C + j] *= factor;
    for (int64_t j = 0; j < from; j++) {
        REAL *e = (REAL *)(s->kept + j / 32 * 32 * s->words + row / PAIR * 32 + j % 32) + row % PAIR;
        *e = STORE(LOAD(*e) * factor);
    }
}

/* Tokens row.. of `rows`, 64 at most, meet n words of the vocabulary. out [64, BLOCK + 32]: room. */
static void NAME(meet)(const NAME(Part) *s, int64_t row, int64_t rows, int64_t from, int64_t n, int64_t valid,
                       const int64_t *targets, REAL *out) {
    const int64_t step = BLOCK + 32, m = least(64, s->padded - row); /* rows apart by no power of two */
    int again = 0;
    lanes before[64];
    memcpy(before, s->sums + row, sizeof(lanes) * m);
    NAME(likelihoods)(s, row, m, from, n, valid, out, step);
    for (int64_t i = 0; i < m; i++) again |= !WITHIN(s->sums[row + i], LARGEST);
    if (again) {
        for (int64_t i = 0; i < m; i++) {
            if (!WITHIN(s->sums[row + i], LARGEST)) NAME(raise)(s, row + i, from, least(n, valid), before[i]);
            else s->sums[row + i] = before[i];
        }
        NAME(likelihoods)(s, row, m, from, n, valid, out, step);
    }
    if (!s->dx) return;
    for (int64_t i = 0; i < least(64, rows - row); i++) {
        const int64_t target = targets[row + i] - s->first - from;
        if (target >= 0 && target < n) out[i * step + target] = STORE(0.0f);
    }
    NAME(add_product)(out, step, m, s->beside + (PAIR == 1 ? 0 : from * (s->C / PAIR)), s->C, n / PAIR, s->dx + row * s->C);
    NAME(columns)(out, step, m, n, s->kept + from * s->words + row / PAIR * 32, s->words);
}

/* This thread's `n` words of the weights w [V, C], of which `valid` are there, as `Part` has them. `beside` is left out
   where it is null, and in float, where `one_beside` makes it again each time: copies of a head in float take room. */
static void NAME(weights_of)(const float *w, int64_t n, int64_t valid, int64_t C, word *across, word *beside) {
    REAL *rounded = room_for(sizeof(REAL) * 32 * C);
    for (int64_t from = 0; from < n; from += 32) {
        const int64_t size = least(32, valid - from) * C, block = from / BLOCK * BLOCK;
        for (int64_t i = 0; i < size; i++) rounded[i] = STORE(w[from * C + i]);
        memset(rounded + size, 0, sizeof(REAL) * (32 * C - size));
        NAME(panels)(rounded, C, 32, C, across + from * (C / PAIR), 0, 1);
        if (PAIR == 2 && beside)
            NAME(columns)(rounded, C, 32, C, beside + block * (C / PAIR) + (from - block) / PAIR * 32,
                          least(BLOCK, n - block) / PAIR);
    }
    give_back(rounded);
}

static void NAME(one_beside)(const float *w, int64_t n, int64_t valid, int64_t C, word *beside) {
    if (PAIR == 2) return;
    if (valid < n) memset(beside, 0, sizeof(word) * n * C);
    NAME(columns)((const REAL *)w, C, least(n, valid), C, beside, n);
}

/* The logits of 8 tokens' targets, as the tiles have them: h [8, C] times their rows of w, rounded in room [8, C]. */
static void NAME(logits)(const REAL *h, const float *w, const int64_t *targets, REAL *room, int64_t C, float *out) {
    const word *x = (const word *)h, *y = (const word *)room;
    lanes sums[8] = {0};
    for (int64_t i = 0; i < 8; i++)
        for (int64_t j = 0; j < C; j++) room[i * C + j] = STORE(w[targets[i] * C + j]);
    for (int64_t k = 0; k < C / PAIR; k++)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sums[i] = MADD(sums[i], SPLAT(x[i * (C / PAIR) + k]), SPLAT(y[i * (C / PAIR) + k]));
    for (int i = 0; i < 8; i++) out[i] = sums[i][0];
}

/* What the tokens of all threads have in common, [threads, ROWS] each but those of one row. */
typedef struct {
    float *reference, *total, *factor, *dx; /* dx: [threads, ROWS, C] */
    float *own, *missing, *rstd;            /* [ROWS]: the target's logit, its part of the gradient, 1 / rms */
} NAME(Tokens);

/* Losses of tokens first..last-1, and what their exponentials and their targets are to be multiplied with. */
static void NAME(divide)(const NAME(Tokens) *t, const float *weights, float *losses, int64_t first, int64_t last,
                         int64_t threads) {
    for (int64_t i = first; i < last; i++) {
        float top = -INFINITY, total = 0.0f;
        for (int64_t k = 0; k < threads; k++) top = fmaxf(top, t->reference[k * ROWS + i]);
        for (int64_t k = 0; k < threads; k++) total += t->total[k * ROWS + i] * expf(t->reference[k * ROWS + i] - top);
        for (int64_t k = 0; k < threads; k++)
            t->factor[k * ROWS + i] = weights[i] / total * expf(t->reference[k * ROWS + i] - top);
        t->missing[i] = weights[i] / total * expf(t->own[i] - top) - weights[i];
        losses[i] = weights[i] * (logf(total) + (top - t->own[i]));
    }
}

/* The gradient of one token's normalised x, dh [C], from all threads and its target's row of w. sum [C]: room. */
static void NAME(whole)(const NAME(Tokens) *t, int64_t i, int64_t threads, int64_t most, const float *w, int64_t C,
                        float *sum, REAL *dh) {
    for (int64_t j = 0; j < C; j++) sum[j] = t->missing[i] * LOAD(STORE(w[j]));
    for (int64_t k = 0; k < threads; k++) {
        const float factor = t->factor[k * ROWS + i], *dx = t->dx + (k * most + i) * C;
        for (int64_t j = 0; j < C; j++) sum[j] += factor * dx[j];
    }
    for (int64_t j = 0; j < C; j++) dh[j] = STORE(sum[j]);
}

/* The gradients of this thread's weights, c, from what it kept of `rows` tokens. */
static void NAME(gather)(const NAME(Part) *s, const NAME(Tokens) *t, const float *factor, const int64_t *targets,
                        int64_t rows, int64_t n, REAL *scaled, float *c) {
    const int64_t C = s->C, padded = s->padded;
    word *room = (word *)(scaled + padded * C);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < C; j++) scaled[i * C + j] = STORE(LOAD(s->h[i * C + j]) * factor[i]);
    memset(scaled + rows * C, 0, sizeof(REAL) * (padded - rows) * C);
    NAME(columns)(scaled, C, padded, C, room, s->words);
    NAME(accumulate)(s->kept, 32, n, room, 32, C, s->words, c);
    for (int64_t i = 0; i < rows; i++) {
        float *at = c + (targets[i] - s->first) * C;
        if (targets[i] >= s->first && targets[i] < s->first + n)
            for (int64_t j = 0; j < C; j++) at[j] += t->missing[i] * LOAD(s->h[i * C + j]);
    }
}

/* The final norm, the head and its loss: losses [N] of x [N, C] through w [V, C], as in cross_entropy; and where dx is
   not null, dx [N, C] and grads: of w [V rounded up to 32, C] and of norm [C]. */
void NAME(head)(const REAL *x, const float *norm, const float *w, const int64_t *targets, const float *weights,
                float *losses, REAL *dx, float *grads, int64_t N, int64_t C, int64_t V, float eps, int threads) {
    const int64_t width = upto32(V), together = V * C < SMALL ? 128 : ROWS, most = least(together, (N + 7) / 8 * 8);
    const int64_t size = sizeof(REAL) * width * C;
    REAL *h = room_for(sizeof(REAL) * most * C);
    word *across = room_for(size), *beside = dx ? room_for(PAIR == 1 ? threads * BLOCK * C * (int64_t)sizeof(word) : size) : NULL;
    word *kept = dx ? room_for(sizeof(REAL) * most * width) : NULL;
    float *numbers = room_for(sizeof(float) * (3 * (threads + 1) * ROWS + threads * (dx ? most + 1 : 1) * C));
    float *of_norm = numbers + 3 * (threads + 1) * ROWS;
    const NAME(Tokens) t = {numbers, numbers + threads * ROWS, numbers + 2 * threads * ROWS, of_norm + threads * C,
                            of_norm - 3 * ROWS, of_norm - 2 * ROWS, of_norm - ROWS};
#pragma omp parallel num_threads(threads)
    {
        REAL *out = room_for(sizeof(REAL) * (64 * (BLOCK + 32) + (2 * most + 2) * C)), *row = out + 64 * (BLOCK + 32);
        REAL *nothing = row + C, *scaled = nothing + C;
        float *wide = room_for(sizeof(float) * C);
        int64_t first, last, from, to;
        const int64_t me = share(width / 32, &first, &last), n = (last - first) * 32, all = omp_get_num_threads();
        first *= 32;
        word *own_beside = dx ? beside + (PAIR == 1 ? me * BLOCK * C : first * (C / PAIR)) : NULL;
        NAME(Part) s = {C, first, 0, 0, across + first * (C / PAIR), own_beside, h,
                        t.reference + me * ROWS, dx ? t.dx + me * most * C : NULL, room_for(sizeof(lanes) * most), NULL};
        float *own = me ? of_norm + (me - 1) * C : grads + width * C;
        memset(nothing, 0, sizeof(REAL) * C);
        if (dx) memset(own, 0, sizeof(float) * C), memset(grads + first * C, 0, sizeof(float) * n * C);
        NAME(weights_of)(w + first * C, n, V - first, C, s.across, s.beside);
        for (int64_t start = 0; start < N; start += together) {
            const int64_t rows = least(together, N - start), padded = (rows + 7) / 8 * 8, *aims = targets + start;
            s.padded = padded, s.words = padded / PAIR, s.kept = dx ? kept + first * s.words : NULL;
            share(padded / 8, &from, &to);
            for (int64_t i = 8 * from; i < 8 * to; i += 8) {
                int64_t eight[8];
                for (int64_t r = i; r < i + 8; r++) {
                    eight[r - i] = r < rows ? aims[r] : 0;
                    if (r < rows) t.rstd[r] = NAME(norm_row)(x + (start + r) * C, norm, h + r * C, C, eps);
                    else memset(h + r * C, 0, sizeof(REAL) * C);
                }
                NAME(logits)(h + i * C, w, eight, scaled, C, t.own + i);
            }
#pragma omp barrier
            memcpy(s.reference, t.own, sizeof(float) * padded);
            memset(s.sums, 0, sizeof(lanes) * padded);
            if (dx) memset(s.dx, 0, sizeof(float) * padded * C);
            for (int64_t j = 0; j < n; j += BLOCK) {
                if (dx) NAME(one_beside)(w + (first + j) * C, least(BLOCK, n - j), V - first - j, C, s.beside);
                for (int64_t i = 0; i < padded; i += 64)
                    NAME(meet)(&s, i, rows, j, least(BLOCK, n - j), V - first - j, aims, out);
            }
            for (int64_t i = 0; i < rows; i++) t.total[me * ROWS + i] = _mm512_reduce_add_ps((__m512)s.sums[i]);
#pragma omp barrier
            share(rows, &from, &to);
            NAME(divide)(&t, weights + start, losses + start, from, to, all);
#pragma omp barrier
            if (dx) {
                NAME(gather)(&s, &t, t.factor + me * ROWS, aims, rows, n, scaled, grads + first * C);
                for (int64_t i = from; i < to; i++) {
                    NAME(whole)(&t, i, all, most, w + aims[i] * C, C, wide, row);
                    NAME(norm_row_backward)(row, x + (start + i) * C, norm, t.rstd[i], nothing, dx + (start + i) * C,
                                            own, C);
                }
            }
#pragma omp barrier
        }
        if (dx) add_up(grads + width * C, of_norm, C);
        give_back(s.sums);
        give_back(wide);
        give_back(out);
    }
    give_back(numbers);
    give_back(kept);
    give_back(beside);
    give_back(across);
    give_back(h);
}
