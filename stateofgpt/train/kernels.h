/* The kernels of one precision. `kernels.c` includes this once per type, having defined

     REAL      how a number lies in memory
     NAME(f)   the function's name with the type's suffix
     LOAD(v)   REAL -> float
     STORE(v)  float -> REAL, rounded to nearest even

   All arithmetic is in float. Rows are divided among threads in one fixed way, so the same number of threads gives the
   same bits. Gradients of gains are summed per thread into `partial` [threads, C], which the caller adds up. */

/* y = x / rms(x) * w for each of n rows of c numbers; rstd[n] keeps 1 / rms(x). RMSNorm, arXiv 1910.07467. */
void NAME(rmsnorm_forward)(const REAL *x, const float *w, REAL *y, float *rstd, int64_t n, int64_t c, float eps,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const REAL *xi = x + i * c;
        REAL *yi = y + i * c;
        float sum = 0.0f;
        for (int64_t j = 0; j < c; j++) {
            const float v = LOAD(xi[j]);
            sum += v * v;
        }
        const float r = 1.0f / sqrtf(sum / (float)c + eps);
        rstd[i] = r;
        for (int64_t j = 0; j < c; j++) yi[j] = STORE(LOAD(xi[j]) * r * w[j]);
    }
}

/* dx = residual + the gradient through the norm; `residual` is what reaches x past it. */
void NAME(rmsnorm_backward)(const REAL *dy, const REAL *x, const float *w, const float *rstd, const REAL *residual,
                            REAL *dx, float *partial, int64_t n, int64_t c, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        float *dw = partial + share(n, &first, &last) * c;
        for (int64_t i = first; i < last; i++) {
            const REAL *xi = x + i * c, *dyi = dy + i * c, *ri = residual + i * c;
            const float r = rstd[i];
            float dot = 0.0f;
            for (int64_t j = 0; j < c; j++) dot += LOAD(dyi[j]) * w[j] * LOAD(xi[j]);
            const float k = dot * r * r * r / (float)c;
            for (int64_t j = 0; j < c; j++) {
                const float d = LOAD(dyi[j]), v = LOAD(xi[j]);
                dw[j] += d * v * r;
                dx[i * c + j] = STORE(LOAD(ri[j]) + d * w[j] * r - k * v);
            }
        }
    }
}

/* From qkv [B * T, (H + 2 K) D] to q [B, H, T, D], k and v [B, K, T, D]: queries and keys normalised per head (where
   there are gains), then rotated by position (arXiv 2104.09864, halves paired as transformers pairs them).
   cosines, sines [positions, D / 2]; `positions` [B, T] replace 0, 1, 2 ... where they are not null; gains [H + K, D] or
   null; rstd [B * T, H + K]. */
void NAME(rope_forward)(const REAL *qkv, const float *gains, const float *cosines, const float *sines,
                        const int64_t *positions, REAL *q, REAL *k, REAL *v, float *rstd, int64_t B, int64_t T, int64_t H,
                        int64_t K, int64_t D, float eps, int threads) {
    const int64_t half = D / 2, heads = H + K;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < B * T; n++) {
        const int64_t b = n / T, t = n % T, at = positions ? positions[n] : t;
        const float *co = cosines + at * half, *si = sines + at * half;
        for (int64_t h = 0; h < heads; h++) {
            const REAL *x = qkv + (n * (heads + K) + h) * D;
            REAL *y = h < H ? q + ((b * H + h) * T + t) * D : k + ((b * K + h - H) * T + t) * D;
            float r = 1.0f;
            if (gains) {
                float sum = 0.0f;
                for (int64_t j = 0; j < D; j++) sum += LOAD(x[j]) * LOAD(x[j]);
                r = 1.0f / sqrtf(sum / (float)D + eps);
                rstd[n * heads + h] = r;
                const float *g = gains + h * D;
                for (int64_t j = 0; j < half; j++) {
                    const float a = LOAD(x[j]) * r * g[j], z = LOAD(x[j + half]) * r * g[j + half];
                    y[j] = STORE(a * co[j] - z * si[j]);
                    y[j + half] = STORE(z * co[j] + a * si[j]);
                }
            } else {
                for (int64_t j = 0; j < half; j++) {
                    const float a = LOAD(x[j]), z = LOAD(x[j + half]);
                    y[j] = STORE(a * co[j] - z * si[j]);
                    y[j + half] = STORE(z * co[j] + a * si[j]);
                }
            }
        }
        for (int64_t h = 0; h < K; h++)
            memcpy(v + ((b * K + h) * T + t) * D, qkv + (n * (heads + K) + heads + h) * D, sizeof(REAL) * D);
    }
}

/* The way back: dq, dk, dv as rope_forward laid them out, into dqkv [B * T, (H + 2 K) D]. partial [threads, (H+K) D]. */
void NAME(rope_backward)(const REAL *dq, const REAL *dk, const REAL *dv, const REAL *qkv, const float *gains,
                         const float *cosines, const float *sines, const int64_t *positions, const float *rstd,
                         REAL *dqkv, float *partial, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D,
                         int threads) {
    const int64_t half = D / 2, heads = H + K;
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last;
        const int64_t own = share(B * T, &first, &last);
        for (int64_t n = first; n < last; n++) {
            const int64_t b = n / T, t = n % T, at = positions ? positions[n] : t;
            const float *co = cosines + at * half, *si = sines + at * half;
            for (int64_t h = 0; h < heads; h++) {
                const REAL *d = h < H ? dq + ((b * H + h) * T + t) * D : dk + ((b * K + h - H) * T + t) * D;
                const REAL *x = qkv + (n * (heads + K) + h) * D;
                REAL *out = dqkv + (n * (heads + K) + h) * D;
                if (gains) {
                    const float *g = gains + h * D, r = rstd[n * heads + h];
                    float *dg = partial + (own * heads + h) * D;
                    float dot = 0.0f;
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
            for (int64_t h = 0; h < K; h++)
                memcpy(dqkv + (n * (heads + K) + heads + h) * D, dv + ((b * K + h) * T + t) * D, sizeof(REAL) * D);
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

/* Softmax of scores [n, width] times `scale`, in place; what a query may not see becomes 0. Row i is the query at place
   t = from + i % rows of its row of tokens. It sees the keys firsts[t]..t, or 0..t where `firsts` [batch, T] is null, and
   before these the first shared[t] keys, where `shared` [batch, T] is not null. `gap` keys that no query here sees have
   no column, and what is shared lies before them. `per_batch` rows share one batch row. */
void NAME(softmax_forward)(REAL *scores, const int32_t *firsts, const int32_t *shared, int64_t n, int64_t rows,
                           int64_t width, int64_t from, int64_t gap, int64_t per_batch, int64_t T, float scale,
                           int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *e = malloc(sizeof(float) * width);
#pragma omp for schedule(static, 16)
        for (int64_t i = 0; i < n; i++) {
            REAL *s = scores + i * width;
            const int64_t t = from + i % rows, place = i / per_batch * T + t;
            const int64_t first = firsts ? firsts[place] - gap : 0, end = t - gap + 1, before = shared ? shared[place] : 0;
            const float top = NAME(largest)(s + first, e + before, end - first, NAME(largest)(s, e, before, -INFINITY));
            const float inverse = 1.0f / exponentials(e, before + end - first, top, scale);
            for (int64_t j = 0; j < before; j++) s[j] = STORE(e[j] * inverse);
            for (int64_t j = first; j < end; j++) s[j] = STORE(e[before + j - first] * inverse);
            memset(s + before, 0, sizeof(REAL) * (first - before));
            memset(s + end, 0, sizeof(REAL) * (width - end));
        }
        free(e);
    }
}

/* Gradient of the scores from that of the probabilities, in place: d = p (d - sum(p d)) scale. Unseen places become 0. */
void NAME(softmax_backward)(const REAL *probs, REAL *grad, int64_t n, int64_t rows, int64_t width, int64_t from,
                            float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 16)
    for (int64_t i = 0; i < n; i++) {
        const REAL *p = probs + i * width;
        REAL *d = grad + i * width;
        const int64_t t = from + i % rows;
        float dot = 0.0f;
        for (int64_t j = 0; j <= t; j++) dot += LOAD(p[j]) * LOAD(d[j]);
        for (int64_t j = 0; j <= t; j++) d[j] = STORE(LOAD(p[j]) * (LOAD(d[j]) - dot) * scale);
        memset(d + t + 1, 0, sizeof(REAL) * (width - t - 1));
    }
}

/* SwiGLU (arXiv 2002.05202): out [n, c] = silu(gate) * up, both halves of x [n, 2 c]. */
void NAME(swiglu_forward)(const REAL *x, REAL *out, int64_t n, int64_t c, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const REAL *gate = x + 2 * i * c, *up = gate + c;
        for (int64_t j = 0; j < c; j++) {
            const float g = LOAD(gate[j]);
            out[i * c + j] = STORE(g / (1.0f + exponential(-g)) * LOAD(up[j]));
        }
    }
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

/* Weighted cross-entropy of logits [n, c]: losses[n] = weight (log sum exp - logit of the target), and the logits become
   their gradient. */
void NAME(cross_entropy)(REAL *logits, const int64_t *targets, const float *weights, float *losses, int64_t n, int64_t c,
                         int with_gradient, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *e = malloc(sizeof(float) * c);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            REAL *x = logits + i * c;
            const float w = weights[i], own = LOAD(x[targets[i]]);
            const float top = NAME(largest)(x, e, c, -INFINITY), sum = exponentials(e, c, top, 1.0f), k = w / sum;
            losses[i] = w * (logf(sum) + top - own);
            if (!with_gradient) continue;
            for (int64_t j = 0; j < c; j++) x[j] = STORE(e[j] * k);
            x[targets[i]] = STORE(e[targets[i]] * k - w);
        }
        free(e);
    }
}
