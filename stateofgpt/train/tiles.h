/* A decoder's block, its attention and its head of one precision, 64 tokens at a time: what a product makes is still in
   the core's cache when the next pass reads it, and what is cheap is computed again on the way back instead of kept.
   Passes are those of `kernels.h` and `lanes.h`, products those of `products.h`, and with the same number of threads the bits are the
   same. Widths (C hidden, A = H D of all heads, I feed-forward, D of a head) are multiples of 32.

   Gradients of weights are summed in float, by each thread for its own tokens, the first in the result itself. */

/* This thread's share of a matrix of weights [k, n] as words down its columns (all of them after a barrier). */
static const word *NAME(down_shared)(const REAL *w, int64_t k, int64_t n, word *room, int64_t *to) {
    int64_t first, last;
    share(k / 2, &first, &last);
    const word *own = NAME(down)(w + 2 * first * n, n, 2 * (last - first), n, room + first * n, to);
    return PAIR == 1 ? (const word *)w : own - first * n;
}

/* This thread's share of float weights w [n], rounded; where they go on. */
static REAL *NAME(round_shared)(const float *w, int64_t n, REAL *out) {
    int64_t first, last;
    share(n, &first, &last);
    for (int64_t i = first; i < last; i++) out[i] = STORE(w[i]);
    return out + n;
}

/* This thread's share of the panels of w^T, w [n, k]. */
static void NAME(panels_shared)(const REAL *w, int64_t n, int64_t k, word *out) {
    int64_t first, last;
    share((n + 31) / 32, &first, &last);
    NAME(panels)(w, k, n, k, out, first, last);
}

static void NAME(round_qkv)(const float *q, const float *k, const float *v, int64_t C, int64_t of_q, int64_t of_k,
                            REAL *out) {
    out = NAME(round_shared)(q, of_q * C, out);
    out = NAME(round_shared)(k, of_k * C, out);
    NAME(round_shared)(v, of_k * C, out);
}

/* Into a block: x [B T, C] normalised, times the transposed weights of q, k and v, to q, k and v as in rope_forward.
   Kept: qkv, both rstd. */
void NAME(enter_block)(const REAL *x, const float *norm, const float *q_w, const float *k_w, const float *v_w,
                       const float *gains, const float *cosines, const float *sines, const int64_t *positions,
                       float *rstd, REAL *qkv, REAL *q, REAL *k, REAL *v, float *rstd_qk, int64_t B, int64_t T,
                       int64_t C, int64_t H, int64_t K, int64_t D, float eps, int threads) {
    const int64_t W = (H + 2 * K) * D;
    REAL *qkv_w = room_for(sizeof(REAL) * 2 * W * C);
    word *weights = (word *)(qkv_w + W * C);
#pragma omp parallel num_threads(threads)
    {
        REAL *h = room_for(sizeof(REAL) * TOKENS * C);
        int64_t first, last;
        share((B * T + TOKENS - 1) / TOKENS, &first, &last);
        NAME(round_qkv)(q_w, k_w, v_w, C, H * D, K * D, qkv_w);
#pragma omp barrier
        NAME(panels_shared)(qkv_w, W, C, weights);
#pragma omp barrier
        for (int64_t from = first * TOKENS; from < last * TOKENS && from < B * T; from += TOKENS) {
            const int64_t rows = least(TOKENS, B * T - from);
            for (int64_t n = from; n < from + rows; n++)
                rstd[n] = NAME(norm_row)(x + n * C, norm, h + (n - from) * C, C, eps);
            NAME(multiply)(h, C, rows, weights, 32, C / PAIR * 32, W, C / PAIR, NULL, qkv + from * W, W);
            for (int64_t n = from; n < from + rows; n++) {
                const int64_t b = n / T, t = n % T, own = (b * K * T + t) * D;
                const int64_t at = (positions ? positions[n] : t) * (D / 2);
                NAME(rope_row)(qkv + n * W, gains, cosines + at, sines + at, q + (b * H * T + t) * D, k + own, v + own, T * D, rstd_qk + n * (H + K), H, K, D, eps);
            }
        }
        free(h);
    }
    free(qkv_w);
}

/* The way back, from dq, dk, dv and what reaches x past the block (`residual`) to dx; grads: of the weights of q, k
   and v together [W, C], of norm [C] and of the gains [H + K, D], one after the other. */
void NAME(enter_block_backward)(const REAL *dq, const REAL *dk, const REAL *dv, const REAL *residual, const REAL *x,
                                const float *norm, const float *q_w, const float *k_w, const float *v_w,
                                const float *gains, const float *cosines, const float *sines, const int64_t *positions,
                                const float *rstd, const REAL *qkv, const float *rstd_qk, REAL *dx, float *grads,
                                int64_t B, int64_t T, int64_t C, int64_t H, int64_t K, int64_t D, int threads) {
    const int64_t W = (H + 2 * K) * D, size = W * C + C + (H + K) * D;
    REAL *qkv_w = room_for(sizeof(REAL) * 2 * W * C);
    word *weights = (word *)(qkv_w + W * C);
    float *others = room_for(sizeof(float) * (threads - 1) * size);
#pragma omp parallel num_threads(threads)
    {
        REAL *h = room_for(sizeof(REAL) * TOKENS * (W + 2 * C)), *dh = h + TOKENS * C, *dqkv = dh + TOKENS * C;
        word *left = room_for(sizeof(word) * TOKENS / 2 * (W + C)), *right = left + TOKENS / 2 * W;
        int64_t first, last, to, tl, tr;
        const int64_t me = share((B * T + TOKENS - 1) / TOKENS, &first, &last);
        float *own = me ? others + (me - 1) * size : grads;
        memset(own, 0, sizeof(float) * size);
        NAME(round_qkv)(q_w, k_w, v_w, C, H * D, K * D, qkv_w);
#pragma omp barrier
        const word *qkv_words = NAME(down_shared)(qkv_w, W, C, weights, &to);
#pragma omp barrier
        for (int64_t from = first * TOKENS; from < last * TOKENS && from < B * T; from += TOKENS) {
            const int64_t rows = least(TOKENS, B * T - from);
            for (int64_t n = from; n < from + rows; n++) {
                const int64_t b = n / T, t = n % T, key = (b * K * T + t) * D;
                const int64_t at = (positions ? positions[n] : t) * (D / 2);
                NAME(rope_row_backward)(dq + (b * H * T + t) * D, dk + key, dv + key, T * D, qkv + n * W, gains,
                                        cosines + at, sines + at, rstd_qk + n * (H + K), dqkv + (n - from) * W,
                                        own + W * C + C, H, K, D);
                NAME(scaled_row)(x + n * C, norm, rstd[n], h + (n - from) * C, C);
            }
            const word *a = NAME(down)(dqkv, W, rows, W, left, &tl), *b = NAME(down)(h, C, rows, C, right, &tr);
            NAME(accumulate)(a, tl, W, b, tr, C, (rows + PAIR - 1) / PAIR, own);
            NAME(multiply)(dqkv, W, rows, qkv_words, to, 32, C, W / PAIR, NULL, dh, C);
            for (int64_t n = from; n < from + rows; n++)
                NAME(norm_row_backward)(dh + (n - from) * C, x + n * C, norm, rstd[n], residual + n * C, dx + n * C,
                                        own + W * C, C);
        }
        add_up(grads, others, size);
        free(left);
        free(h);
    }
    free(others);
    free(qkv_w);
}

/* The weights that lead out of a block, rounded: those of output [C, A], gate and up together [2 I, C], down [C, I]. */
static void NAME(round_rest)(const float *o, const float *gate, const float *up, const float *down, int64_t of_o,
                             int64_t of_gate, REAL *out) {
    out = NAME(round_shared)(o, of_o, out);
    out = NAME(round_shared)(gate, of_gate, out);
    out = NAME(round_shared)(up, of_gate, out);
    NAME(round_shared)(down, of_gate, out);
}

/* Out of a block: y [N, A] times o_w^T plus x is `middle` [N, C]; that normalised, times gate_w^T and up_w^T, is `gate_up`
   [N, 2 I]; SwiGLU of it, times down_w^T, plus `middle` is out [N, C]. Kept: middle, rstd [N], gate_up. */
void NAME(leave_block)(const REAL *y, const REAL *x, const float *norm, const float *o_w, const float *gate_w,
                       const float *up_w, const float *down_w, REAL *middle, float *rstd, REAL *gate_up, REAL *out,
                       int64_t N, int64_t C, int64_t A, int64_t I, float eps, int threads) {
    const int64_t size = C * (A + 3 * I);
    REAL *rounded = room_for(sizeof(REAL) * 2 * size);
    word *o = (word *)(rounded + size), *gu = o + C * A / PAIR, *down = gu + 2 * I * C / PAIR;
#pragma omp parallel num_threads(threads)
    {
        REAL *h = room_for(sizeof(REAL) * TOKENS * (C + I)), *hidden = h + TOKENS * C;
        NAME(round_rest)(o_w, gate_w, up_w, down_w, C * A, C * I, rounded);
#pragma omp barrier
        NAME(panels_shared)(rounded, C, A, o);
        NAME(panels_shared)(rounded + C * A, 2 * I, C, gu);
        NAME(panels_shared)(rounded + C * A + 2 * I * C, C, I, down);
        int64_t first, last;
        share((N + TOKENS - 1) / TOKENS, &first, &last);
#pragma omp barrier
        for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
            const int64_t rows = least(TOKENS, N - from);
            REAL *mid = middle + from * C, *both = gate_up + from * 2 * I;
            NAME(multiply)(y + from * A, A, rows, o, 32, A / PAIR * 32, C, A / PAIR, x + from * C, mid, C);
            for (int64_t i = 0; i < rows; i++) rstd[from + i] = NAME(norm_row)(mid + i * C, norm, h + i * C, C, eps);
            NAME(multiply)(h, C, rows, gu, 32, C / PAIR * 32, 2 * I, C / PAIR, NULL, both, 2 * I);
            for (int64_t i = 0; i < rows; i++) NAME(swiglu_lanes)(both + 2 * i * I, hidden + i * I, I);
            NAME(multiply)(hidden, I, rows, down, 32, I / PAIR * 32, C, I / PAIR, mid, out + from * C, C);
        }
        free(h);
    }
    free(rounded);
}

/* The way back: from dout [N, C] to dmiddle [N, C], which reaches x past the attention too, and dy [N, A]; grads: of o_w
   [C, A], of gate_w and up_w together [2 I, C], of down_w [C, I] and of norm [C], one after the other. */
void NAME(leave_block_backward)(const REAL *dout, const REAL *y, const float *norm, const float *o_w,
                                const float *gate_w, const float *up_w, const float *down_w, const REAL *middle,
                                const float *rstd, const REAL *gate_up, REAL *dmiddle, REAL *dy, float *grads, int64_t N,
                                int64_t C, int64_t A, int64_t I, int threads) {
    const int64_t of_gate_up = C * A, of_down = of_gate_up + 2 * I * C, of_norm = of_down + C * I, size = of_norm + C;
    REAL *rounded = room_for(sizeof(REAL) * 2 * of_norm);
    word *rooms = (word *)(rounded + of_norm);
    float *others = room_for(sizeof(float) * (threads - 1) * size);
#pragma omp parallel num_threads(threads)
    {
        REAL *h = room_for(sizeof(REAL) * TOKENS * (2 * C + 4 * I)), *dh = h + TOKENS * C, *hidden = dh + TOKENS * C;
        REAL *dhidden = hidden + TOKENS * I, *both = dhidden + TOKENS * I;
        const int64_t widest = 2 * I + C + A;
        word *left = room_for(sizeof(word) * TOKENS * widest), *right = left + TOKENS / 2 * widest;
        int64_t first, last, to, tg, td, tl, tr;
        const int64_t me = share((N + TOKENS - 1) / TOKENS, &first, &last);
        float *own = me ? others + (me - 1) * size : grads;
        memset(own, 0, sizeof(float) * size);
        NAME(round_rest)(o_w, gate_w, up_w, down_w, C * A, C * I, rounded);
#pragma omp barrier
        const word *o = NAME(down_shared)(rounded, C, A, rooms, &to);
        const word *gu = NAME(down_shared)(rounded + of_gate_up, 2 * I, C, rooms + of_gate_up / PAIR, &tg);
        const word *down = NAME(down_shared)(rounded + of_down, C, I, rooms + of_down / PAIR, &td);
#pragma omp barrier
        for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
            const int64_t rows = least(TOKENS, N - from), words = (rows + PAIR - 1) / PAIR;
            const REAL *mid = middle + from * C, *d = dout + from * C;
            REAL *dmid = dmiddle + from * C;
            NAME(multiply)(d, C, rows, down, td, 32, I, C / PAIR, NULL, dhidden, I);
            for (int64_t i = 0; i < rows; i++) {
                NAME(swiglu_lanes_backward)(dhidden + i * I, gate_up + (from + i) * 2 * I, both + 2 * i * I, hidden + i * I, I);
                NAME(scaled_row)(mid + i * C, norm, rstd[from + i], h + i * C, C);
            }
            const word *a = NAME(down)(d, C, rows, C, left, &tl), *b = NAME(down)(hidden, I, rows, I, right, &tr);
            NAME(accumulate)(a, tl, C, b, tr, I, words, own + of_down);
            a = NAME(down)(both, 2 * I, rows, 2 * I, left, &tl), b = NAME(down)(h, C, rows, C, right, &tr);
            NAME(accumulate)(a, tl, 2 * I, b, tr, C, words, own + of_gate_up);
            NAME(multiply)(both, 2 * I, rows, gu, tg, 32, C, 2 * I / PAIR, NULL, dh, C);
            for (int64_t i = 0; i < rows; i++)
                NAME(norm_row_backward)(dh + i * C, mid + i * C, norm, rstd[from + i], d + i * C, dmid + i * C,
                                        own + of_norm, C);
            a = NAME(down)(dmid, C, rows, C, left, &tl), b = NAME(down)(y + from * A, A, rows, A, right, &tr);
            NAME(accumulate)(a, tl, C, b, tr, A, words, own);
            NAME(multiply)(dmid, C, rows, o, to, 32, A, C / PAIR, NULL, dy + from * A, A);
        }
        add_up(grads, others, size);
        free(left);
        free(h);
    }
    free(others);
    free(rounded);
}

/* Causal attention: y [B T, H D] and, for each head, the probabilities of 32 queries after the other, each such block as
   wide as the keys it sees, rounded up to 32. `firsts` [B, T]: where each position's document begins, or null. */
void NAME(attend)(const REAL *q, const REAL *k, const REAL *v, const int32_t *firsts, REAL *probs, REAL *y, int64_t B,
                  int64_t T, int64_t H, int64_t K, int64_t D, float scale, int threads) {
    const int64_t widest = upto32(T), per_head = probabilities(T);
#pragma omp parallel num_threads(threads)
    {
        word *keys = room_for(sizeof(word) * 2 * widest * D), *room = keys + widest * D;
        float *e = room_for(sizeof(float) * widest);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < B * K; i++) {
            int64_t to;
            NAME(panels)(k + i * T * D, D, T, D, keys, 0, widest / 32);
            const word *values = NAME(down)(v + i * T * D, D, T, D, room, &to);
            for (int64_t h = i * (H / K); h < (i + 1) * (H / K); h++) {
                REAL *p = probs + h * per_head;
                for (int64_t from = 0; from < T; from += QUERIES) {
                    const int64_t rows = least(QUERIES, T - from), width = upto32(from + rows), b = h / H;
                    NAME(multiply)(q + (h * T + from) * D, D, rows, keys, 32, D / PAIR * 32, width, D / PAIR, NULL, p, width);
                    for (int64_t t = from; t < from + rows; t++)
                        NAME(softmax_lanes)(p + (t - from) * width, e, firsts ? firsts[b * T + t] : 0, t + 1, width, scale);
                    NAME(multiply)(p, width, rows, values, to, 32, D, (least(width, T) + PAIR - 1) / PAIR, NULL,
                                   y + ((b * T + from) * H + h % H) * D, H * D);
                    p += rows * width;
                }
            }
        }
        free(e);
        free(keys);
    }
}

/* Gradients of q, k and v from dy [B T, H D]. */
void NAME(attend_backward)(const REAL *dy, const REAL *q, const REAL *k, const REAL *v, const REAL *probs, REAL *dq,
                           REAL *dk, REAL *dv, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, float scale,
                           int threads) {
    const int64_t widest = upto32(T), per_head = probabilities(T);
#pragma omp parallel num_threads(threads)
    {
        word *values = room_for(sizeof(word) * (2 * widest * D + QUERIES * (widest + D)));
        word *room = values + widest * D, *left = room + widest * D, *right = left + QUERIES * widest;
        REAL *ds = room_for(sizeof(REAL) * QUERIES * widest);
        float *dkeys = room_for(sizeof(float) * 2 * widest * D), *dvalues = dkeys + widest * D;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < B * K; i++) {
            int64_t to, tl, tr;
            NAME(panels)(v + i * T * D, D, T, D, values, 0, widest / 32);
            const word *keys = NAME(down)(k + i * T * D, D, T, D, room, &to);
            memset(dkeys, 0, sizeof(float) * 2 * widest * D);
            for (int64_t h = i * (H / K); h < (i + 1) * (H / K); h++) {
                const REAL *p = probs + h * per_head;
                for (int64_t from = 0; from < T; from += QUERIES) {
                    const int64_t rows = least(QUERIES, T - from), width = upto32(from + rows), b = h / H;
                    const int64_t words = (rows + PAIR - 1) / PAIR;
                    const REAL *d = dy + ((b * T + from) * H + h % H) * D, *own = q + (h * T + from) * D;
                    NAME(multiply)(d, H * D, rows, values, 32, D / PAIR * 32, width, D / PAIR, NULL, ds, width);
                    for (int64_t t = from; t < from + rows; t++)
                        NAME(softmax_lanes_backward)(p + (t - from) * width, ds + (t - from) * width, width, scale);
                    NAME(multiply)(ds, width, rows, keys, to, 32, D, (least(width, T) + PAIR - 1) / PAIR, NULL,
                                   dq + (h * T + from) * D, D);
                    const word *a = NAME(down)(ds, width, rows, width, left, &tl);
                    const word *w = NAME(down)(own, D, rows, D, right, &tr);
                    NAME(accumulate)(a, tl, width, w, tr, D, words, dkeys);
                    a = NAME(down)(p, width, rows, width, left, &tl), w = NAME(down)(d, H * D, rows, D, right, &tr);
                    NAME(accumulate)(a, tl, width, w, tr, D, words, dvalues);
                    p += rows * width;
                }
            }
            for (int64_t j = 0; j < T * D; j++) dk[i * T * D + j] = STORE(dkeys[j]);
            for (int64_t j = 0; j < T * D; j++) dv[i * T * D + j] = STORE(dvalues[j]);
        }
        free(dkeys);
        free(ds);
        free(values);
    }
}

/* The final norm, the head and its loss: losses [N] of x [N, C] through w [V, C], as in cross_entropy; and where dx is
   not null, dx [N, C] and grads: of w [V rounded up to 32, C] and of norm [C]. */
void NAME(head)(const REAL *x, const float *norm, const float *w, const int64_t *targets, const float *weights,
                float *losses, REAL *dx, float *grads, int64_t N, int64_t C, int64_t V, float eps, int threads) {
    const int64_t width = upto32(V), step = width + 32, size = width * C + C; /* rows apart by no power of two */
    REAL *rounded = room_for(sizeof(REAL) * 3 * width * C);
    word *across = (word *)(rounded + width * C), *room = across + width * C / PAIR;
    float *others = room_for(sizeof(float) * (dx ? threads - 1 : 0) * size);
#pragma omp parallel num_threads(threads)
    {
        REAL *h = room_for(sizeof(REAL) * (TOKENS * (2 * C + step) + C)), *dh = h + TOKENS * C, *nothing = dh + TOKENS * C;
        REAL *logits = nothing + C;
        float *e = room_for(sizeof(float) * (width + TOKENS)), *r = e + width;
        word *left = room_for(sizeof(word) * TOKENS / 2 * (width + C)), *right = left + TOKENS / 2 * width;
        int64_t first, last, to = C, tl, tr;
        const int64_t me = share((N + TOKENS - 1) / TOKENS, &first, &last);
        float *own = me ? others + (me - 1) * size : grads;
        memset(nothing, 0, sizeof(REAL) * C);
        if (dx) memset(own, 0, sizeof(float) * size);
        NAME(round_shared)(w, V * C, rounded);
#pragma omp single
        memset(rounded + V * C, 0, sizeof(REAL) * (width - V) * C);
        NAME(panels_shared)(rounded, width, C, across);
        const word *words = NAME(down_shared)(rounded, width, C, room, &to);
#pragma omp barrier
        for (int64_t from = first * TOKENS; from < last * TOKENS && from < N; from += TOKENS) {
            const int64_t rows = least(TOKENS, N - from);
            for (int64_t i = 0; i < rows; i++)
                r[i] = NAME(norm_row)(x + (from + i) * C, norm, h + i * C, C, eps);
            NAME(multiply)(h, C, rows, across, 32, C / PAIR * 32, width, C / PAIR, NULL, logits, step);
            for (int64_t i = 0; i < rows; i++)
                losses[from + i] = NAME(cross_entropy_lanes)(logits + i * step, targets[from + i], weights[from + i], e, V, width, dx != NULL);
            if (!dx) continue;
            const word *a = NAME(down)(logits, step, rows, width, left, &tl), *b = NAME(down)(h, C, rows, C, right, &tr);
            NAME(accumulate)(a, tl, width, b, tr, C, (rows + PAIR - 1) / PAIR, own);
            NAME(multiply)(logits, step, rows, words, to, 32, C, width / PAIR, NULL, dh, C);
            for (int64_t i = 0; i < rows; i++)
                NAME(norm_row_backward)(dh + i * C, x + (from + i) * C, norm, r[i], nothing, dx + (from + i) * C,
                                        own + width * C, C);
        }
        if (dx) add_up(grads, others, size);
        free(left);
        free(e);
        free(h);
    }
    free(others);
    free(rounded);
}
