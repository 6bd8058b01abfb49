/* A decoder's block and its attention of one precision, 64 tokens at a time: what a product makes is still in
   the core's cache when the next pass reads it, and what is cheap is computed again on the way back instead of kept.
   Passes are those of `kernels.h` and `lanes.h`, products those of `products.h`, and with the same number of threads the
   bits are the same. Widths (C hidden, A = H D of all heads, I feed-forward, D of a head) are multiples of 32.

   The static functions are called by all threads of a team together, each for its own tokens or heads; between two of
   them lies a barrier where one reads what another thread's part of the other has written. `trunk.h` makes the teams.

   Gradients of weights are summed in float, by each thread for its own tokens, the first in the result itself. */

/* out [m, n] = a [m, k] w [k, n], w as words down its columns. */
static void NAME(multiply_down)(const REAL *a, int64_t m, const word *w, int64_t k, int64_t n, REAL *out) {
    const int64_t to = FEW(n) ? n : 32;
    NAME(multiply)(a, k, m, w, to, APART(to, k / PAIR), n, k / PAIR, NULL, out, n);
}

/* A layer's four products' weights as words, one after the other. */
typedef struct {
    const word *qkv, *o, *gate_up, *down;
} NAME(Words);

static NAME(Words) NAME(words_at)(const Shape *s, const word *at) {
    const int64_t o = all_heads(s) * s->C / PAIR, gate_up = o + s->C * s->H * s->D / PAIR;
    return (NAME(Words)){at, at + o, at + gate_up, at + gate_up + 2 * s->I * s->C / PAIR};
}

/* This thread's share of the matrices of a layer, rounded, as `words_at` finds them: turned over, as panels, which the way
   forward multiplies by; or as words `down` their columns, which the way back does. They are taken 32 rows at a time. */
static void NAME(words_of_layer)(const Shape *s, const Layer *layer, int down, word *out) {
    const int64_t C = s->C, A = s->H * s->D, of_k = s->K * s->D, I = s->I, W = all_heads(s);
    const struct {
        const float *w;
        int64_t n, k, all; /* rows, columns, rows of all that are multiplied together */
    } each[7] = {{layer->q, A, C, W},        {layer->k, of_k, C, W},   {layer->v, of_k, C, W}, {layer->o, C, A, C},
                 {layer->gate, I, C, 2 * I}, {layer->up, I, C, 2 * I}, {layer->down, C, I, C}};
    const int64_t threads = omp_get_num_threads();
    REAL *room = room_for(sizeof(REAL) * 32 * (I + A + C)); /* for 32 rows of any */
    int64_t before = 0, turn = omp_get_thread_num(); /* rows of the same product before these; whose turn it is */
    for (int i = 0; i < 7; i++) {
        const int64_t k = each[i].k, n = each[i].n, all = each[i].all;
        for (int64_t r = 0; r < n; r += 32, turn++) {
            if (turn % threads) continue;
            const float *from = each[i].w + r * k;
            if (PAIR == 2)
                for (int64_t j = 0; j < 32 * k; j++) room[j] = STORE(from[j]);
            const REAL *rows = PAIR == 2 ? room : (const REAL *)from;
            if (!down) NAME(panels)(rows, k, 32, k, out + (before + r) * (k / PAIR), 0, 1);
            else if (FEW(k)) memcpy(out + (before + r) * k, rows, sizeof(REAL) * 32 * k);
            else NAME(columns)(rows, k, 32, k, out + (before + r) / PAIR * 32, all / PAIR);
        }
        before = before + n < all ? before + n : 0;
        if (!before) out += all * k / PAIR;
    }
    give_back(room);
}

/* What one layer keeps for its way back: its input x [N, C] and 1 / rms of it, queries, keys and values before (qkv
   [N, (H + 2 K) D]) and after normalisation and rotation (q [B, H, T, D], k, v [B, K, T, D]) and 1 / rms of their heads,
   the attention's probabilities and its output y [N, A], `middle` [N, C], which is y times the output's weights plus x,
   1 / rms of it, and gate and up [N, 2 I]. */
typedef struct {
    REAL *x, *qkv, *q, *k, *v, *probs, *y, *middle, *gate_up;
    float *rstd, *rstd_qk, *rstd_mlp;
} NAME(Kept);

/* Into a block: x normalised, times the weights of q, k and v, to q, k and v as in rope_forward. gains [H + K, D]. */
static void NAME(enter)(const Shape *s, const float *norm, const float *gains, const word *weights, const NAME(Kept) *kept) {
    const int64_t N = s->B * s->T, T = s->T, C = s->C, H = s->H, K = s->K, D = s->D, W = all_heads(s);
    REAL *h = room_for(sizeof(REAL) * TOKENS * C);
    int64_t first, last;
    share((N + TOKENS - 1) / TOKENS, &first, &last);
    for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
        const int64_t rows = least(TOKENS, N - from);
        for (int64_t n = from; n < from + rows; n++)
            kept->rstd[n] = NAME(norm_row)(kept->x + n * C, norm, h + (n - from) * C, C, s->eps);
        NAME(multiply)(h, C, rows, weights, 32, C / PAIR * 32, W, C / PAIR, NULL, kept->qkv + from * W, W);
        for (int64_t n = from; n < from + rows; n++) {
            const int64_t b = n / T, t = n % T, own = (b * K * T + t) * D;
            const int64_t at = (s->positions ? s->positions[n] : t) * (D / 2);
            NAME(rope_row)(kept->qkv + n * W, gains, s->cosines + at, s->sines + at, kept->q + (b * H * T + t) * D,
                           kept->k + own, kept->v + own, T * D, kept->rstd_qk + n * (H + K), H, K, D, s->eps);
        }
    }
    give_back(h);
}

/* The way back, from dq, dk, dv and what reaches x past the block (`residual`) to dx. Added to `own`: of the weights of
   q, k and v together [W, C], of norm [C] and of the gains [H + K, D], one after the other. */
static void NAME(enter_backward)(const Shape *s, const float *norm, const float *gains, const word *weights,
                                 const NAME(Kept) *kept, const REAL *dq, const REAL *dk, const REAL *dv,
                                 const REAL *residual, REAL *dx, float *own) {
    const int64_t N = s->B * s->T, T = s->T, C = s->C, H = s->H, K = s->K, D = s->D, W = all_heads(s);
    REAL *h = room_for(sizeof(REAL) * TOKENS * (W + 2 * C)), *dh = h + TOKENS * C, *dqkv = dh + TOKENS * C;
    word *left = room_for(sizeof(word) * TOKENS / PAIR * (W + C)), *right = left + TOKENS / PAIR * W;
    int64_t first, last, tl, tr;
    share((N + TOKENS - 1) / TOKENS, &first, &last);
    for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
        const int64_t rows = least(TOKENS, N - from);
        for (int64_t n = from; n < from + rows; n++) {
            const int64_t b = n / T, t = n % T, key = (b * K * T + t) * D;
            const int64_t at = (s->positions ? s->positions[n] : t) * (D / 2);
            NAME(rope_row_backward)(dq + (b * H * T + t) * D, dk + key, dv + key, T * D, kept->qkv + n * W, gains,
                                    s->cosines + at, s->sines + at, kept->rstd_qk + n * (H + K),
                                    dqkv + (n - from) * W, own + W * C + C, H, K, D);
            NAME(scaled_row)(kept->x + n * C, norm, kept->rstd[n], h + (n - from) * C, C);
        }
        const word *a = NAME(down_left)(dqkv, W, rows, W, left, &tl), *b = NAME(down)(h, C, rows, C, right, &tr);
        NAME(accumulate)(a, tl, W, b, tr, C, (rows + PAIR - 1) / PAIR, own);
        NAME(multiply_down)(dqkv, rows, weights, W, C, dh);
        for (int64_t n = from; n < from + rows; n++)
            NAME(norm_row_backward)(dh + (n - from) * C, kept->x + n * C, norm, kept->rstd[n], residual + n * C,
                                    dx + n * C, own + W * C, C);
    }
    give_back(left);
    give_back(h);
}

/* Out of a block: y times the output's weights plus x is `middle`; that normalised, times those of gate and up, is
   `gate_up`; SwiGLU of it, times those of down, plus `middle` is out [N, C]. */
static void NAME(leave)(const Shape *s, const float *norm, const NAME(Words) *w, const NAME(Kept) *kept, REAL *out) {
    const int64_t N = s->B * s->T, C = s->C, A = s->H * s->D, I = s->I;
    REAL *h = room_for(sizeof(REAL) * TOKENS * (C + I)), *hidden = h + TOKENS * C;
    int64_t first, last;
    share((N + TOKENS - 1) / TOKENS, &first, &last);
    for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
        const int64_t rows = least(TOKENS, N - from);
        REAL *mid = kept->middle + from * C, *both = kept->gate_up + from * 2 * I;
        NAME(multiply)(kept->y + from * A, A, rows, w->o, 32, A / PAIR * 32, C, A / PAIR, kept->x + from * C, mid, C);
        for (int64_t i = 0; i < rows; i++)
            kept->rstd_mlp[from + i] = NAME(norm_row)(mid + i * C, norm, h + i * C, C, s->eps);
        NAME(multiply)(h, C, rows, w->gate_up, 32, C / PAIR * 32, 2 * I, C / PAIR, NULL, both, 2 * I);
        for (int64_t i = 0; i < rows; i++) NAME(swiglu_lanes)(both + 2 * i * I, hidden + i * I, I);
        NAME(multiply)(hidden, I, rows, w->down, 32, I / PAIR * 32, C, I / PAIR, mid, out + from * C, C);
    }
    give_back(h);
}

/* The way back: from dout [N, C] to dmiddle [N, C], which reaches x past the attention too, and dy [N, A]. Added to
   `own`: of the weights of output [C, A], of gate and up together [2 I, C], of down [C, I] and of norm [C], one after
   the other. */
static void NAME(leave_backward)(const Shape *s, const float *norm, const NAME(Words) *w, const NAME(Kept) *kept,
                                 const REAL *dout, REAL *dmiddle, REAL *dy, float *own) {
    const int64_t N = s->B * s->T, C = s->C, A = s->H * s->D, I = s->I;
    float *own_gate_up = own + C * A, *own_down = own_gate_up + 2 * I * C, *own_norm = own_down + C * I;
    REAL *h = room_for(sizeof(REAL) * TOKENS * (2 * C + 4 * I)), *dh = h + TOKENS * C, *hidden = dh + TOKENS * C;
    REAL *dhidden = hidden + TOKENS * I, *both = dhidden + TOKENS * I;
    const int64_t widest = 2 * I + C + A;
    word *left = room_for(sizeof(word) * TOKENS / PAIR * 2 * widest), *right = left + TOKENS / PAIR * widest;
    int64_t first, last, tl, tr;
    share((N + TOKENS - 1) / TOKENS, &first, &last);
    for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
        const int64_t rows = least(TOKENS, N - from), words = (rows + PAIR - 1) / PAIR;
        const REAL *mid = kept->middle + from * C, *d = dout + from * C, *gate_up = kept->gate_up + from * 2 * I;
        REAL *dmid = dmiddle + from * C;
        NAME(multiply_down)(d, rows, w->down, C, I, dhidden);
        for (int64_t i = 0; i < rows; i++) {
            NAME(swiglu_lanes_backward)(dhidden + i * I, gate_up + 2 * i * I, both + 2 * i * I, hidden + i * I, I);
            NAME(scaled_row)(mid + i * C, norm, kept->rstd_mlp[from + i], h + i * C, C);
        }
        const word *a = NAME(down_left)(d, C, rows, C, left, &tl), *b = NAME(down)(hidden, I, rows, I, right, &tr);
        NAME(accumulate)(a, tl, C, b, tr, I, words, own_down);
        a = NAME(down_left)(both, 2 * I, rows, 2 * I, left, &tl), b = NAME(down)(h, C, rows, C, right, &tr);
        NAME(accumulate)(a, tl, 2 * I, b, tr, C, words, own_gate_up);
        NAME(multiply_down)(both, rows, w->gate_up, 2 * I, C, dh);
        for (int64_t i = 0; i < rows; i++)
            NAME(norm_row_backward)(dh + i * C, mid + i * C, norm, kept->rstd_mlp[from + i], d + i * C, dmid + i * C,
                                    own_norm, C);
        a = NAME(down_left)(dmid, C, rows, C, left, &tl), b = NAME(down)(kept->y + from * A, A, rows, A, right, &tr);
        NAME(accumulate)(a, tl, C, b, tr, A, words, own);
        NAME(multiply_down)(dmid, rows, w->o, C, A, dy + from * A);
    }
    give_back(left);
    give_back(h);
}

/* Causal attention of this thread's heads: y, and the probabilities of 32 queries after the other, each such block as
   wide as the keys it is shown (`seen_by`). */
static void NAME(attend)(const Shape *s, const NAME(Kept) *kept) {
    const int64_t T = s->T, H = s->H, K = s->K, D = s->D, widest = upto32(T), all = (T + PAIR - 1) / PAIR;
    const float scale = 1.0f / sqrtf((float)D);
    word *keys = room_for(sizeof(word) * 2 * widest * D), *room = keys + widest * D;
    float *e = room_for(sizeof(float) * widest);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < s->B * K; i++) {
        const int64_t b = i / K, group = H / K;
        int64_t to;
        NAME(panels)(kept->k + i * T * D, D, T, D, keys, 0, widest / 32);
        const word *values = NAME(down)(kept->v + i * T * D, D, T, D, room, &to);
        REAL *p = kept->probs + s->before_row[b] * H + i % K * group * s->of_row[b];
        for (int64_t h = i * group; h < (i + 1) * group; h++)
            for (int64_t from = 0; from < T; from += QUERIES) {
                const Seen seen = seen_by(s, b, from);
                const int64_t rows = seen.rows, own = seen.end - seen.from, width = seen.width;
                const REAL *q = kept->q + (h * T + from) * D;
                REAL *y = kept->y + ((b * T + from) * H + h % H) * D;
                NAME(multiply)(q, D, rows, keys, 32, D / PAIR * 32, seen.shared, D / PAIR, NULL, p, width);
                NAME(multiply)(q, D, rows, keys + seen.from * D / PAIR, 32, D / PAIR * 32, own, D / PAIR, NULL,
                               p + seen.shared, width);
                for (int64_t t = from; t < from + rows; t++) {
                    const int64_t left_out = seen.from - seen.shared;
                    const int64_t before = s->shared ? s->shared[b * T + t] : 0;
                    const int64_t first = s->firsts ? s->firsts[b * T + t] - left_out : 0;
                    NAME(softmax_lanes)(p + (t - from) * width, e, least(before, first), first, t + 1 - left_out, width,
                                        scale);
                }
                if (seen.shared)
                    NAME(multiply)(p, width, rows, values, to, APART(to, all), D, seen.shared / PAIR, NULL, y, H * D);
                NAME(multiply)(p + seen.shared, width, rows, values + seen.from / PAIR * to, to, APART(to, all), D,
                               (least(seen.end, T) - seen.from + PAIR - 1) / PAIR, seen.shared ? y : NULL, y, H * D);
                p += rows * width;
            }
    }
    give_back(e);
    give_back(keys);
}

/* Gradients of q, k and v from dy [B T, H D]. */
static void NAME(attend_backward)(const Shape *s, const NAME(Kept) *kept, const REAL *dy, REAL *dq, REAL *dk, REAL *dv) {
    const int64_t T = s->T, H = s->H, K = s->K, D = s->D, widest = upto32(T), all = (T + PAIR - 1) / PAIR;
    const float scale = 1.0f / sqrtf((float)D);
    word *values = room_for(sizeof(word) * (2 * widest * D + QUERIES * (widest + D)));
    word *room = values + widest * D, *left = room + widest * D, *right = left + QUERIES * widest;
    REAL *ds = room_for(sizeof(REAL) * QUERIES * widest);
    float *dkeys = room_for(sizeof(float) * 2 * widest * D), *dvalues = dkeys + widest * D;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < s->B * K; i++) {
        const int64_t b = i / K, group = H / K;
        int64_t to, tl, tr;
        NAME(panels)(kept->v + i * T * D, D, T, D, values, 0, widest / 32);
        const word *keys = NAME(down)(kept->k + i * T * D, D, T, D, room, &to);
        memset(dkeys, 0, sizeof(float) * 2 * widest * D);
        const REAL *p = kept->probs + s->before_row[b] * H + i % K * group * s->of_row[b];
        for (int64_t h = i * group; h < (i + 1) * group; h++)
            for (int64_t from = 0; from < T; from += QUERIES) {
                const Seen seen = seen_by(s, b, from);
                const int64_t rows = seen.rows, shared = seen.shared, own = seen.end - seen.from, width = seen.width;
                const int64_t words = (rows + PAIR - 1) / PAIR;
                const REAL *d = dy + ((b * T + from) * H + h % H) * D, *q = kept->q + (h * T + from) * D;
                REAL *to_q = dq + (h * T + from) * D;
                NAME(multiply)(d, H * D, rows, values, 32, D / PAIR * 32, shared, D / PAIR, NULL, ds, width);
                NAME(multiply)(d, H * D, rows, values + seen.from * D / PAIR, 32, D / PAIR * 32, own, D / PAIR, NULL,
                               ds + shared, width);
                for (int64_t t = 0; t < rows; t++)
                    NAME(softmax_lanes_backward)(p + t * width, ds + t * width, width, scale);
                if (shared) NAME(multiply)(ds, width, rows, keys, to, APART(to, all), D, shared / PAIR, NULL, to_q, D);
                NAME(multiply)(ds + shared, width, rows, keys + seen.from / PAIR * to, to, APART(to, all), D,
                               (least(seen.end, T) - seen.from + PAIR - 1) / PAIR, shared ? to_q : NULL, to_q, D);
                const word *a = NAME(down_left)(ds, width, rows, width, left, &tl);
                const word *w = NAME(down)(q, D, rows, D, right, &tr);
                const int64_t past = shared / 32 * APART(tl, words);
                NAME(accumulate)(a, tl, shared, w, tr, D, words, dkeys);
                NAME(accumulate)(a + past, tl, own, w, tr, D, words, dkeys + seen.from * D);
                a = NAME(down_left)(p, width, rows, width, left, &tl), w = NAME(down)(d, H * D, rows, D, right, &tr);
                NAME(accumulate)(a, tl, shared, w, tr, D, words, dvalues);
                NAME(accumulate)(a + past, tl, own, w, tr, D, words, dvalues + seen.from * D);
                p += rows * width;
            }
        for (int64_t j = 0; j < T * D; j++) dk[i * T * D + j] = STORE(dkeys[j]);
        for (int64_t j = 0; j < T * D; j++) dv[i * T * D + j] = STORE(dvalues[j]);
    }
    give_back(dkeys);
    give_back(ds);
    give_back(values);
}
