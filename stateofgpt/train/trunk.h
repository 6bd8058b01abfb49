/* All blocks of a decoder in one call forward and one back, of one precision: between embedding and final norm nothing is
   asked of anybody else, so that the threads of a team meet only where one needs what another has made. Pieces are those
   of `tiles.h`.

   What the way back needs lies in `room`, `trunk_bytes` long: where rows begin among the probabilities, the inputs of all
   layers, and what each layer keeps. Where nothing is kept, layers take turns in it. */

/* What one layer keeps, in `room`; `*end` is where the last layer's ends. */
static NAME(Kept) NAME(kept_at)(const Shape *s, uintptr_t room, int64_t keep, int64_t layer, uintptr_t *end) {
    const int64_t N = s->B * s->T, A = s->H * s->D, x = sizeof(REAL) * N * s->C, heads = s->H + s->K;
    NAME(Kept) k;
    take(&room, sizeof(int64_t) * 2 * s->B);
    const uintptr_t xs = take(&room, (keep ? s->L : 2) * x), begin = room;
    k.x = (REAL *)(xs + (keep ? layer : layer % 2) * x);
    for (int64_t turn = 0; turn <= (keep ? layer : 0); turn++) {
        k.qkv = (REAL *)take(&room, sizeof(REAL) * N * all_heads(s));
        k.q = (REAL *)take(&room, sizeof(REAL) * N * A);
        k.k = (REAL *)take(&room, sizeof(REAL) * N * s->K * s->D);
        k.v = (REAL *)take(&room, sizeof(REAL) * N * s->K * s->D);
        k.y = (REAL *)take(&room, sizeof(REAL) * N * A);
        k.middle = (REAL *)take(&room, x);
        k.gate_up = (REAL *)take(&room, sizeof(REAL) * N * 2 * s->I);
        k.probs = (REAL *)take(&room, sizeof(REAL) * s->H * (s->before_row[s->B - 1] + s->of_row[s->B - 1]));
        k.rstd = (float *)take(&room, sizeof(float) * N);
        k.rstd_qk = (float *)take(&room, sizeof(float) * N * heads);
        k.rstd_mlp = (float *)take(&room, sizeof(float) * N);
        if (turn == 0) *end = begin + (keep ? s->L : 1) * (room - begin);
    }
    return k;
}

/* How long `room` is. */
void NAME(trunk_bytes)(const int64_t *sizes, const int32_t *firsts, const int32_t *shared, int64_t keep, int64_t *bytes) {
    int64_t *rows = room_for(sizeof(int64_t) * 2 * sizes[0]);
    const Shape s = shape_of(sizes, 0.0f, NULL, NULL, NULL, firsts, shared, rows);
    uintptr_t end;
    count_probabilities(&s);
    NAME(kept_at)(&s, 0, keep, 0, &end);
    *bytes = (int64_t)end;
    give_back(rows);
}

/* A layer's gains of all heads [H + K, D], or null where it has none. */
static const float *NAME(gains_of)(const Shape *s, const Layer *layer, float *room) {
    if (!layer->q_norm) return NULL;
    for (int64_t h = 0; h < s->H + s->K; h++)
        memcpy(room + h * s->D, h < s->H ? layer->q_norm : layer->k_norm, sizeof(float) * s->D);
    return room;
}

/* From ids [B, T] through all blocks to out [B T, C], which is not normalised yet. embedding [V, C]. Where an id is not
   below V, its place is given back in place of -1, and nothing is done. */
int64_t NAME(trunk)(const int64_t *sizes, const Layer *layers, const float *embedding, int64_t V, const int64_t *ids,
                    const float *cosines, const float *sines, const int64_t *positions, const int32_t *firsts,
                    const int32_t *shared, int64_t keep, char *room, REAL *out, float eps, int threads) {
    const Shape s = shape_of(sizes, eps, cosines, sines, positions, firsts, shared, (int64_t *)room);
    const int64_t N = s.B * s.T, C = s.C, size = of_matrices(&s), bad = unknown(ids, N, V);
    if (bad >= 0) return bad;
    word *panels = room_for(sizeof(REAL) * s.L * size);
    count_probabilities(&s);
#pragma omp parallel num_threads(threads)
    {
        float *gains = room_for(sizeof(float) * (s.H + s.K) * s.D);
        uintptr_t end;
        int64_t first, last;
        share((N + TOKENS - 1) / TOKENS, &first, &last);
        REAL *x = s.L ? NAME(kept_at)(&s, (uintptr_t)room, keep, 0, &end).x : out;
        for (int64_t n = first * TOKENS; n < least(last * TOKENS, N); n++)
            for (int64_t j = 0; j < C; j++) x[n * C + j] = STORE(embedding[ids[n] * C + j]);
        for (int64_t l = 0; l < s.L; l++) NAME(words_of_layer)(&s, layers + l, 0, panels + l * size / PAIR);
#pragma omp barrier
        for (int64_t l = 0; l < s.L; l++) {
            const NAME(Kept) kept = NAME(kept_at)(&s, (uintptr_t)room, keep, l, &end);
            const NAME(Words) words = NAME(words_at)(&s, panels + l * size / PAIR);
            NAME(enter)(&s, layers[l].norm, NAME(gains_of)(&s, layers + l, gains), words.qkv, &kept);
#pragma omp barrier
            NAME(attend)(&s, &kept);
#pragma omp barrier
            NAME(leave)(&s, layers[l].norm_mlp, &words, &kept,
                        l + 1 < s.L ? NAME(kept_at)(&s, (uintptr_t)room, keep, l + 1, &end).x : out);
        }
        give_back(gains);
    }
    give_back(panels);
    return -1;
}

/* The way back from dout [B T, C]. grads, a layer after the other: as enter_backward has them and then as leave_backward,
   of the gains those of the first query head and of the first key head, summed over heads. What is due to the embedding
   is added to dembedding [vocabulary, C], which may be null. */
void NAME(trunk_backward)(const int64_t *sizes, const Layer *layers, const int64_t *ids, const float *cosines,
                          const float *sines, const int64_t *positions, const int32_t *firsts, const int32_t *shared,
                          char *room, const REAL *dout, float *grads, float *dembedding, int threads) {
    const Shape s = shape_of(sizes, 0.0f, cosines, sines, positions, firsts, shared, (int64_t *)room);
    const int64_t N = s.B * s.T, C = s.C, A = s.H * s.D, size = of_matrices(&s), heads = s.H + s.K;
    const int64_t of_gains = all_heads(&s) * C + C, of_enter = of_gains + heads * s.D, of_layer = size + 2 * C + heads * s.D;
    word *down = room_for(sizeof(REAL) * s.L * size);
    float *others = room_for(sizeof(float) * (threads - 1) * s.L * of_layer);
    REAL *dx = room_for(sizeof(REAL) * N * (2 * C + 2 * A + 2 * s.K * s.D)), *dmiddle = dx + N * C, *dy = dmiddle + N * C;
    REAL *dq = dy + N * A, *dk = dq + N * A, *dv = dk + N * s.K * s.D;
#pragma omp parallel num_threads(threads)
    {
        float *gains = room_for(sizeof(float) * heads * s.D);
        uintptr_t end;
        int64_t first, last;
        const int64_t me = share(N, &first, &last);
        float *own = me ? others + (me - 1) * s.L * of_layer : grads;
        memset(own, 0, sizeof(float) * s.L * of_layer);
        for (int64_t l = 0; l < s.L; l++) NAME(words_of_layer)(&s, layers + l, 1, down + l * size / PAIR);
#pragma omp barrier
        for (int64_t l = s.L - 1; l >= 0; l--) {
            const NAME(Kept) kept = NAME(kept_at)(&s, (uintptr_t)room, 1, l, &end);
            const NAME(Words) words = NAME(words_at)(&s, down + l * size / PAIR);
            NAME(leave_backward)(&s, layers[l].norm_mlp, &words, &kept, l + 1 < s.L ? dx : dout, dmiddle, dy,
                                 own + l * of_layer + of_enter);
#pragma omp barrier
            NAME(attend_backward)(&s, &kept, dy, dq, dk, dv);
#pragma omp barrier
            NAME(enter_backward)(&s, layers[l].norm, NAME(gains_of)(&s, layers + l, gains), words.qkv, &kept, dq, dk,
                                 dv, dmiddle, dx, own + l * of_layer);
        }
        add_up(grads, others, s.L * of_layer);
        if (dembedding) { /* each thread some numbers of all tokens, in order */
            share(C, &first, &last);
            for (int64_t n = 0; n < N; n++)
                for (int64_t j = first; j < last; j++) dembedding[ids[n] * C + j] += LOAD((s.L ? dx : dout)[n * C + j]);
        }
#pragma omp barrier
        share(s.L, &first, &last);
        for (int64_t l = first; l < last; l++)
            for (int64_t h = 1; h < heads; h++) {
                float *to = grads + l * of_layer + of_gains + (h < s.H ? 0 : s.H) * s.D;
                for (int64_t j = 0; j < s.D && h != s.H; j++) to[j] += grads[l * of_layer + of_gains + h * s.D + j];
            }
        give_back(gains);
    }
    give_back(dx);
    give_back(others);
    give_back(down);
}

/* A whole step's loss and gradients: ids [B, T] to the cross-entropy with `targets`, weighted by `weights` over `divisor`,
   into losses [B T]. grads: as trunk_backward has them; of the head [V rounded up to 32, C] and of the last norm [C], as
   `head` has them; and of the embedding [V, C], or nothing where the head is the embedding. Gives back what `trunk` does,
   for targets too, which come after ids. */
int64_t NAME(learn)(const int64_t *sizes, const Layer *layers, const float *embedding, const float *norm,
                    const float *head, int64_t V, const float *cosines, const float *sines, float eps, float *grads,
                    const int64_t *ids, const int64_t *targets, const float *weights, float divisor,
                    const int32_t *firsts, float *losses, int threads) {
    const Shape s = shape_of(sizes, eps, cosines, sines, NULL, firsts, NULL, NULL);
    const int64_t N = s.B * s.T, C = s.C, of_head = upto32(V) * C;
    float *own_head = grads + s.L * (of_matrices(&s) + 2 * C + (s.H + s.K) * s.D);
    float *own_embedding = head == embedding ? own_head : own_head + of_head + C;
    const int64_t wrong = unknown(ids, N, V), target = unknown(targets, N, V);
    if (wrong >= 0 || target >= 0) return wrong >= 0 ? wrong : N + target;
    float *parts = room_for(sizeof(float) * N);
    int64_t bytes;
    NAME(trunk_bytes)(sizes, firsts, NULL, 1, &bytes);
    char *room = room_for(bytes);
    REAL *x = room_for(sizeof(REAL) * 2 * N * C), *dx = x + N * C;
    for (int64_t n = 0; n < N; n++) parts[n] = weights[n] / divisor;
    NAME(trunk)(sizes, layers, embedding, V, ids, cosines, sines, NULL, firsts, NULL, 1, room, x, eps, threads);
    NAME(head)(x, norm, head, targets, parts, losses, dx, own_head, N, C, V, eps, threads);
    if (head != embedding) memset(own_embedding, 0, sizeof(float) * V * C);
    NAME(trunk_backward)(sizes, layers, ids, cosines, sines, NULL, firsts, NULL, room, dx, grads, own_embedding, threads);
    give_back(x);
    give_back(room);
    give_back(parts);
    return -1;
}
