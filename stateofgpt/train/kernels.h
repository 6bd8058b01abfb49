/* The kernels of one precision. `kernels.c` includes this once per type, having defined

     REAL      how a number lies in memory
     NAME(f)   the function's name with the type's suffix
     LOAD(v)   REAL -> float
     STORE(v)  float -> REAL, rounded to nearest even

   All arithmetic is in float. Rows are divided among threads in one fixed way, so the same number of threads gives the
   same bits. Gradients of gains are summed per thread into `partial` [threads, C], which the caller adds up. */

/* y = x / rms(x) * w for one row of c numbers; 1 / rms(x). RMSNorm, arXiv 1910.07467. */
ROW float NAME(norm_row)(const REAL *x, const float *w, REAL *restrict y, int64_t c, float eps) {
    float sum = 0.0f;
    for (int64_t j = 0; j < c; j++) {
        const float v = LOAD(x[j]);
        sum += v * v;
    }
    const float r = 1.0f / sqrtf(sum / (float)c + eps);
    for (int64_t j = 0; j < c; j++) y[j] = STORE(LOAD(x[j]) * r * w[j]);
    return r;
}

/* y once more, r being 1 / rms(x). */
ROW void NAME(scaled_row)(const REAL *x, const float *w, float r, REAL *restrict y, int64_t c) {
    for (int64_t j = 0; j < c; j++) y[j] = STORE(LOAD(x[j]) * r * w[j]);
}

/* The same for each of n rows; rstd[n] keeps 1 / rms(x). */
void NAME(rmsnorm_forward)(const REAL *x, const float *w, REAL *y, float *rstd, int64_t n, int64_t c, float eps,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) rstd[i] = NAME(norm_row)(x + i * c, w, y + i * c, c, eps);
}

/* One row: dx = residual + the gradient through the norm, r being 1 / rms(x); the gradient of w is added to dw. */
ROW void NAME(norm_row_backward)(const REAL *dy, const REAL *x, const float *w, float r, const REAL *residual,
                                           REAL *restrict dx, float *restrict dw, int64_t c) {
    float dot = 0.0f;
    for (int64_t j = 0; j < c; j++) dot += LOAD(dy[j]) * w[j] * LOAD(x[j]);
    const float k = dot * r * r * r / (float)c;
    for (int64_t j = 0; j < c; j++) {
        const float d = LOAD(dy[j]), v = LOAD(x[j]);
        dw[j] += d * v * r;
        dx[j] = STORE(LOAD(residual[j]) + d * w[j] * r - k * v);
    }
}

/* The same for n rows; `residual` is what reaches x past the norm. */
void NAME(rmsnorm_backward)(const REAL *dy, const REAL *x, const float *w, const float *rstd, const REAL *residual,
                            REAL *dx, float *partial, int64_t n, int64_t c, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        float *dw = partial + share(n, &first, &last) * c;
        for (int64_t i = first; i < last; i++)
            NAME(norm_row_backward)(dy + i * c, x + i * c, w, rstd[i], residual + i * c, dx + i * c, dw, c);
    }
}

/* One token's row of qkv [(H + 2 K) D]: queries and keys normalised per head (where there are gains), then rotated by
   position (arXiv 2104.09864, halves paired as transformers pairs them). q, k and v are the token's in the first head,
   and `step` numbers on in the next. cosines, sines [D / 2] of its position; gains [H + K, D] or null; rstd [H + K]. */
ROW void NAME(rope_row)(const REAL *x, const float *gains, const float *cosines, const float *sines, REAL *q,
                                  REAL *k, REAL *v, int64_t step, float *rstd, int64_t H, int64_t K, int64_t D,
                                  float eps) {
    const int64_t half = D / 2;
    for (int64_t h = 0; h < H + K; h++, x += D) {
        REAL *restrict y = h < H ? q + h * step : k + (h - H) * step;
        if (gains) {
            float sum = 0.0f;
            for (int64_t j = 0; j < D; j++) sum += LOAD(x[j]) * LOAD(x[j]);
            const float r = rstd[h] = 1.0f / sqrtf(sum / (float)D + eps), *g = gains + h * D;
#pragma GCC ivdep
            for (int64_t j = 0; j < half; j++) {
                const float a = LOAD(x[j]) * r * g[j], z = LOAD(x[j + half]) * r * g[j + half];
                y[j] = STORE(a * cosines[j] - z * sines[j]);
                y[j + half] = STORE(z * cosines[j] + a * sines[j]);
            }
        } else {
#pragma GCC ivdep
            for (int64_t j = 0; j < half; j++) {
                const float a = LOAD(x[j]), z = LOAD(x[j + half]);
                y[j] = STORE(a * cosines[j] - z * sines[j]);
                y[j + half] = STORE(z * cosines[j] + a * sines[j]);
            }
        }
    }
    for (int64_t h = 0; h < K; h++) memcpy(v + h * step, x + h * D, sizeof(REAL) * D);
}

/* From qkv [B * T, (H + 2 K) D] to q [B, H, T, D], k and v [B, K, T, D]. cosines, sines [positions, D / 2]; `positions`
   [B, T] replace 0, 1, 2 ... where they are not null; rstd [B * T, H + K]. */
void NAME(rope_forward)(const REAL *qkv, const float *gains, const float *cosines, const float *sines,
                        const int64_t *positions, REAL *q, REAL *k, REAL *v, float *rstd, int64_t B, int64_t T, int64_t H,
                        int64_t K, int64_t D, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < B * T; n++) {
        const int64_t b = n / T, t = n % T, own = (b * K * T + t) * D, at = (positions ? positions[n] : t) * (D / 2);
        NAME(rope_row)(qkv + n * (H + 2 * K) * D, gains, cosines + at, sines + at,
                       q + (b * H * T + t) * D, k + own, v + own, T * D, rstd + n * (H + K), H, K, D, eps);
    }
}

/* The way back for one token: dq, dk, dv as rope_row laid them out, into its row of dqkv. Gradients of the gains are
   added to dgains [H + K, D]. */
ROW void NAME(rope_row_backward)(const REAL *dq, const REAL *dk, const REAL *dv, int64_t step, const REAL *x,
                                           const float *gains, const float *co, const float *si, const float *rstd,
                                           REAL *restrict out, float *restrict dgains, int64_t H, int64_t K,
                                           int64_t D) {
    const int64_t half = D / 2;
    for (int64_t h = 0; h < H + K; h++, x += D, out += D) {
        const REAL *d = h < H ? dq + h * step : dk + (h - H) * step;
        if (gains) {
            const float *g = gains + h * D, r = rstd[h];
            float *restrict dg = dgains + h * D, dot = 0.0f;
            for (int64_t j = 0; j < half; j++) {
                const float p = LOAD(d[j]), z = LOAD(d[j + half]);
                const float a = p * co[j] + z * si[j], e = z * co[j] - p * si[j];
                const float xa = LOAD(x[j]), xe = LOAD(x[j + half]);
                dg[j] += a * xa * r;
                dg[j + half] += e * xe * r;
                dot += a * g[j] * xa + e * g[j + half] * xe;
            }
            const float c = dot * r * r * r / (float)D;
            for (int64_t j = 0; j < half; j++) {
                const float p = LOAD(d[j]), z = LOAD(d[j + half]);
                out[j] = STORE((p * co[j] + z * si[j]) * g[j] * r - c * LOAD(x[j]));
                out[j + half] = STORE((z * co[j] - p * si[j]) * g[j + half] * r - c * LOAD(x[j + half]));
            }
        } else {
            for (int64_t j = 0; j < half; j++) {
                const float p = LOAD(d[j]), z = LOAD(d[j + half]);
                out[j] = STORE(p * co[j] + z * si[j]);
                out[j + half] = STORE(z * co[j] - p * si[j]);
            }
        }
    }
    for (int64_t h = 0; h < K; h++) memcpy(out + h * D, dv + h * step, sizeof(REAL) * D);
}

/* The same for all tokens, shapes as in rope_forward. partial [threads, (H + K) D]. */
void NAME(rope_backward)(const REAL *dq, const REAL *dk, const REAL *dv, const REAL *qkv, const float *gains,
                         const float *cosines, const float *sines, const int64_t *positions, const float *rstd,
                         REAL *dqkv, float *partial, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D,
                         int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        float *dgains = partial + share(B * T, &first, &last) * (H + K) * D;
        for (int64_t n = first; n < last; n++) {
            const int64_t b = n / T, t = n % T, own = (b * K * T + t) * D, row = n * (H + 2 * K) * D;
            const int64_t at = (positions ? positions[n] : t) * (D / 2);
            NAME(rope_row_backward)(dq + (b * H * T + t) * D, dk + own, dv + own, T * D, qkv + row, gains, cosines + at,
                                    sines + at, rstd + n * (H + K), dqkv + row, dgains, H, K, D);
        }
    }
}

/* e[n] = x as float; the largest of x and of `top`. */
static inline float NAME(largest)(const REAL *x, float *e, int64_t n, float top) {
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; j++) {
        e[j] = LOAD(x[j]);
        top = e[j] > top ? e[j] : top;
    }
    return top;
}

/* Softmax of one row of scores [width] times `scale`, in place, over the keys 0..before-1 and first..end-1; all others
   become 0. e [width]. */
ROW void NAME(softmax_row)(REAL *s, float *e, int64_t before, int64_t first, int64_t end, int64_t width,
                                     float scale) {
    const float top = NAME(largest)(s + first, e + before, end - first, NAME(largest)(s, e, before, -INFINITY));
    const float inverse = 1.0f / exponentials(e, before + end - first, top, scale);
    for (int64_t j = 0; j < before; j++) s[j] = STORE(e[j] * inverse);
    for (int64_t j = first; j < end; j++) s[j] = STORE(e[before + j - first] * inverse);
    memset(s + before, 0, sizeof(REAL) * (first - before));
    memset(s + end, 0, sizeof(REAL) * (width - end));
}

/* The same for scores [n, width]. Row i is the query at place t = from + i % rows of its row of tokens. It sees the keys
   firsts[t]..t, or 0..t where `firsts` [batch, T] is null, and before these the first shared[t] keys, where `shared`
   [batch, T] is not null. `gap` keys that no query here sees have no column, and what is shared lies before them.
   `per_batch` rows share one batch row. */
void NAME(softmax_forward)(REAL *scores, const int32_t *firsts, const int32_t *shared, int64_t n, int64_t rows,
                           int64_t width, int64_t from, int64_t gap, int64_t per_batch, int64_t T, float scale,
                           int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *e = malloc(sizeof(float) * width);
#pragma omp for schedule(static, 16)
        for (int64_t i = 0; i < n; i++) {
            const int64_t t = from + i % rows, place = i / per_batch * T + t;
            NAME(softmax_row)(scores + i * width, e, shared ? shared[place] : 0, firsts ? firsts[place] - gap : 0,
                              t - gap + 1, width, scale);
        }
        free(e);
    }
}

/* Gradient of one row of scores from that of the probabilities, in place: d = p (d - sum(p d)) scale; 0 after t. */
ROW void NAME(softmax_row_backward)(const REAL *restrict p, REAL *restrict d, int64_t t, int64_t width, float scale) {
    float dot = 0.0f;
    for (int64_t j = 0; j <= t; j++) dot += LOAD(p[j]) * LOAD(d[j]);
    for (int64_t j = 0; j <= t; j++) d[j] = STORE(LOAD(p[j]) * (LOAD(d[j]) - dot) * scale);
    memset(d + t + 1, 0, sizeof(REAL) * (width - t - 1));
}

void NAME(softmax_backward)(const REAL *probs, REAL *grad, int64_t n, int64_t rows, int64_t width, int64_t from,
                            float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
    for (int64_t i = 0; i < n; i++)
        NAME(softmax_row_backward)(probs + i * width, grad + i * width, from + i % rows, width, scale);
}

/* SwiGLU (arXiv 2002.05202) of one row: out [c] = silu(gate) * up, both halves of x [2 c]. */
ROW void NAME(swiglu_row)(const REAL *x, REAL *restrict out, int64_t c) {
    for (int64_t j = 0; j < c; j++) {
        const float g = LOAD(x[j]);
        out[j] = STORE(g / (1.0f + exponential(-g)) * LOAD(x[j + c]));
    }
}

void NAME(swiglu_forward)(const REAL *x, REAL *out, int64_t n, int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) NAME(swiglu_row)(x + 2 * i * c, out + i * c, c);
}

/* dx may not be x. */
void NAME(swiglu_backward)(const REAL *dout, const REAL *x, REAL *dx, int64_t n, int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const REAL *gate = x + 2 * i * c, *up = gate + c;
        REAL *dgate = dx + 2 * i * c, *dup = dgate + c;
        for (int64_t j = 0; j < c; j++) {
            const float g = LOAD(gate[j]), d = LOAD(dout[i * c + j]);
            const float sigmoid = 1.0f / (1.0f + exponential(-g));
            dgate[j] = STORE(d * LOAD(up[j]) * sigmoid * (1.0f + g * (1.0f - sigmoid)));
            dup[j] = STORE(d * g * sigmoid);
        }
    }
}

/* Weighted cross-entropy of one row of logits [c]: weight w times (log sum exp - logit of the target); and the logits
   become their gradient. e [c]. */
ROW float NAME(cross_entropy_row)(REAL *x, int64_t target, float w, float *e, int64_t c, int with_gradient) {
    const float own = LOAD(x[target]), top = NAME(largest)(x, e, c, -INFINITY), sum = exponentials(e, c, top, 1.0f);
    const float k = w / sum;
    if (with_gradient) {
        for (int64_t j = 0; j < c; j++) x[j] = STORE(e[j] * k);
        x[target] = STORE(e[target] * k - w);
    }
    return w * (logf(sum) + top - own);
}

void NAME(cross_entropy)(REAL *logits, const int64_t *targets, const float *weights, float *losses, int64_t n, int64_t c,
                         int with_gradient, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *e = malloc(sizeof(float) * c);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++)
            losses[i] = NAME(cross_entropy_row)(logits + i * c, targets[i], weights[i], e, c, with_gradient);
        free(e);
    }
}
