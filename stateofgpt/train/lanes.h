/* Passes over one row of one precision, 32 numbers at a time: those of `kernels.h` whose exponentials take longest, for
   rows that are a multiple of 32 wide. `kernels.c` includes this once per type, having defined besides what `kernels.h`
   asks for

     EXP(x), SIGMOID(x)   e^x and 1 / (1 + e^-x) of each lane, as near as the precision is
     GET(p)               16 numbers from p on, as float
     PUT(p, low, high)    32 floats, rounded, to p */

/* SwiGLU of one row, as swiglu_row, for c that is a multiple of 32. */
ROW void NAME(swiglu_lanes)(const REAL *x, REAL *out, int64_t c) {
    for (int64_t j = 0; j < c; j += 32) {
        lanes y[2];
        for (int i = 0; i < 2; i++) {
            const lanes g = GET(x + j + 16 * i);
            y[i] = g * SIGMOID(g) * GET(x + c + j + 16 * i);
        }
        PUT(out + j, y[0], y[1]);
    }
}

/* Its gradient and once more what it gave, as swiglu_row_backward. */
ROW void NAME(swiglu_lanes_backward)(const REAL *dout, const REAL *x, REAL *dx, REAL *out, int64_t c) {
    for (int64_t j = 0; j < c; j += 32) {
        lanes y[2], dgate[2], dup[2];
        for (int i = 0; i < 2; i++) {
            const lanes g = GET(x + j + 16 * i), up = GET(x + c + j + 16 * i), d = GET(dout + j + 16 * i);
            const lanes sigmoid = SIGMOID(g), swish = g * sigmoid;
            y[i] = swish * up;
            dup[i] = d * swish;
            dgate[i] = d * up * (sigmoid + swish - swish * sigmoid);
        }
        PUT(out + j, y[0], y[1]);
        PUT(dx + j, dgate[0], dgate[1]);
        PUT(dx + c + j, dup[0], dup[1]);
    }
}

/* Softmax of one row over keys 0..before-1 and first..end-1 as softmax_row has it; width is a multiple of 32, and so is
   all of e. */
ROW void NAME(softmax_lanes)(REAL *s, float *e, int64_t before, int64_t first, int64_t end, int64_t width, float scale) {
    const int64_t from = before ? 0 : first / 32 * 32, to = upto32(end);
    for (int64_t j = before ? before : from; j < first; j++) s[j] = STORE(-INFINITY);
    for (int64_t j = end; j < to; j++) s[j] = STORE(-INFINITY);
    lanes top[2] = {GET(s + from), GET(s + from + 16)}, sums[2] = {0};
    for (int64_t j = from + 32; j < to; j += 32)
        for (int i = 0; i < 2; i++) top[i] = (lanes)_mm512_max_ps((__m512)top[i], (__m512)GET(s + j + 16 * i));
    const float most = _mm512_reduce_max_ps(_mm512_max_ps((__m512)top[0], (__m512)top[1]));
    for (int64_t j = from; j < to; j += 32)
        for (int i = 0; i < 2; i++) {
            const lanes y = EXP((GET(s + j + 16 * i) - most) * scale);
            *(lanes *)(e + j + 16 * i) = y;
            sums[i] += y;
        }
    const float inverse = 1.0f / _mm512_reduce_add_ps((__m512)(sums[0] + sums[1]));
    for (int64_t j = from; j < to; j += 32) PUT(s + j, *(lanes *)(e + j) * inverse, *(lanes *)(e + j + 16) * inverse);
    memset(s + before, 0, sizeof(REAL) * (first - before));
    memset(s + end, 0, sizeof(REAL) * (width - end));
}

/* Its gradient, where p is 0 for what was not seen: so is then d. */
ROW void NAME(softmax_lanes_backward)(const REAL *p, REAL *d, int64_t width, float scale) {
    lanes sums[2] = {0};
    for (int64_t j = 0; j < width; j += 32)
        for (int i = 0; i < 2; i++) sums[i] += GET(p + j + 16 * i) * GET(d + j + 16 * i);
    const float dot = _mm512_reduce_add_ps((__m512)(sums[0] + sums[1]));
    for (int64_t j = 0; j < width; j += 32) {
        lanes y[2];
        for (int i = 0; i < 2; i++) y[i] = GET(p + j + 16 * i) * (GET(d + j + 16 * i) - dot) * scale;
        PUT(d + j, y[0], y[1]);
    }
}
