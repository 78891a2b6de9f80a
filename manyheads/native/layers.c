// What stands between the products of a layer, in float32: norms, the activation, and attention of trees over pages. For
// a few tokens, torch's operations take longer to be called than to compute. What comes of a token does not depend on
// which others are there.
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16            // of a vector; a head has so many numbers, or a multiple
#define KEYS 64             // that a token looks at at a time
#define WORTHWHILE 0x40000  // from so many multiplications on, threads share the work

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float eights __attribute__((vector_size(32)));
typedef float fours __attribute__((vector_size(16)));

typedef struct {
    int64_t heads, kv_heads, dim, page_size;
    float eps, scale;
} shape;

// Rows of a step, each a tree behind what it has cached.
typedef struct {
    const int32_t *row_start;   // [rows + 1], where a row's tokens begin
    const int64_t *bits;        // [tokens], bit j: the row's token j is this one or above it
    const int64_t *position;    // [tokens]
    const int64_t *cached_len;  // [rows]
    const int64_t *page_table;  // [rows, pages]
    int64_t rows, pages, max_cached_len;
} trees;

// e^x, within two units of the last place; the polynomial is that of Cephes' expf.
INLINE float power(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = floorf(x * 1.44269504f + 0.5f), rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float two_to_whole;
    memcpy(&two_to_whole, &bits, sizeof bits);
    return sum * two_to_whole;
}

INLINE floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE float total_of(floats value) {
    eights eight[2];
    fours four[2];
    memcpy(eight, &value, sizeof eight);
    eight[0] += eight[1];
    memcpy(four, eight, sizeof four);
    four[0] += four[1];
    return (four[0][0] + four[0][1]) + (four[0][2] + four[0][3]);
}

INLINE float dot(const float *a, const float *b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += a[i] * b[i];
    return sum;
}

// y = x / rms(x) * weight; x and y may be the same.
INLINE void norm(const float *x, const float *weight, float *y, float eps, int64_t size) {
    float factor = 1 / sqrtf(dot(x, x, size) / size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

void manyheads_rms_norm(const float *x, const float *weight, float *y, float eps, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > WORTHWHILE)
    for (int64_t r = 0; r < rows; r++) norm(x + r * size, weight, y + r * size, eps, size);
}

// residual += multiplier * x, and the norm of that.
void manyheads_add_rms_norm(const float *x, float *residual, const float *weight, float *y, float eps,
                            float multiplier, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > WORTHWHILE)
    for (int64_t r = 0; r < rows; r++) {
        float *sum = residual + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) sum[i] += multiplier * x[r * size + i];
        norm(sum, weight, y + r * size, eps, size);
    }
}

// [rows, 2 * size] -> [rows, size]
void manyheads_silu_mul(const float *gate_up, float *y, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size > WORTHWHILE)
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = gate_up + 2 * r * size, *up = gate + size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) y[r * size + i] = gate[i] / (1 + power(-gate[i])) * up[i];
    }
}

// What a token puts where others look is finite: see `attention/torch.py`.
INLINE void clean(float *x, int64_t size) {
    const float most = 0x1.fffffep+125f;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) x[i] = x[i] != x[i] ? 0 : x[i] > most ? most : x[i] < -most ? -most : x[i];
}

// Norms of queries and keys, if there are weights; both are turned in place, and keys and values go to their slots.
//
//   qkv       [tokens, heads + 2 * kv_heads, dim]
//   cos, sin  [tokens, dim]; the first half of sin is negated
void manyheads_turn(const shape *s, float *qkv, const float *cos, const float *sin, const float *q_norm,
                    const float *k_norm, float *keys, float *values, const int64_t *slots, int64_t tokens) {
    const int64_t dim = s->dim, half = dim / 2, turned = s->heads + s->kv_heads, each = turned + s->kv_heads;
#pragma omp parallel for if (tokens * each * dim > WORTHWHILE)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * dim, *n = sin + t * dim;
        float *own = qkv + t * each * dim;
        clean(own + s->heads * dim, 2 * s->kv_heads * dim);
        for (int64_t h = 0; h < turned; h++) {
            float *x = own + h * dim;
            if (q_norm) norm(x, h < s->heads ? q_norm : k_norm, x, s->eps, dim);
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = x[i], second = x[i + half];
                x[i] = first * c[i] + second * n[i];
                x[i + half] = second * c[i + half] + first * n[i + half];
            }
        }
        const int64_t place = slots[t] * s->kv_heads * dim, size = s->kv_heads * dim;
        memcpy(keys + place, own + s->heads * dim, size * sizeof(float));
        memcpy(values + place, own + turned * dim, size * sizeof(float));
    }
}

// Attention of one token's heads that share a K/V head; softmax as of Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax".
INLINE void attend(const shape *s, const trees *g, const float *q, const float *keys, const float *values, float *y,
                   int64_t row, int64_t t, int64_t window, int64_t kv_head, int64_t dim) {
    const int64_t heads = s->heads / s->kv_heads, first = g->row_start[row], at = g->position[t];
    const int64_t cached = g->cached_len[row], stop = cached + g->row_start[row + 1] - first;
    const int64_t *pages = g->page_table + row * g->pages, low = window && at >= window ? at + 1 - window : 0;
    float most[heads], total[heads], score[KEYS];
    for (int64_t h = 0; h < heads; h++) most[h] = -INFINITY, total[h] = 0;
    memset(y, 0, heads * dim * sizeof(float));
    for (int64_t i = low < cached ? low : cached; i < stop;) {
        int64_t place[KEYS];
        int count = 0;
        for (; i < stop && count < KEYS; i++) {
            const int64_t node = i - cached;
            if (node >= 0 && (!(g->bits[t] >> node & 1) || g->position[first + node] < low)) continue;
            place[count++] = ((pages[i / s->page_size] * s->page_size + i % s->page_size) * s->kv_heads + kv_head) * dim;
        }
        for (int64_t h = 0; count && h < heads; h++) {
            float best = most[h], added = 0;
            for (int c = 0; c < count; c++) {
                floats product = {0};
                for (int64_t d = 0; d < dim; d += LANES) product += load(q + h * dim + d) * load(keys + place[c] + d);
                score[c] = total_of(product) * s->scale;
                best = score[c] > best ? score[c] : best;
            }
            const float factor = power(most[h] - best);
#pragma omp simd reduction(+ : added)
            for (int c = 0; c < count; c++) added += score[c] = power(score[c] - best);
            most[h] = best, total[h] = total[h] * factor + added;
            floats sum[dim / LANES];
            for (int64_t d = 0; d < dim / LANES; d++) sum[d] = load(y + h * dim + d * LANES) * factor;
            for (int c = 0; c < count; c++)
                for (int64_t d = 0; d < dim / LANES; d++) sum[d] += score[c] * load(values + place[c] + d * LANES);
            memcpy(y + h * dim, sum, dim * sizeof(float));
        }
    }
    for (int64_t h = 0; h < heads; h++)
#pragma omp simd
        for (int64_t d = 0; d < dim; d++) y[h * dim + d] /= total[h];
}

// Every token attends to what its row has cached, through a window unless that is 0, and to its own tree.
//
//   qkv           [tokens, heads + 2 * kv_heads, dim], turned
//   keys, values  [pages * page_size, kv_heads, dim]
//   y             [tokens, heads, dim]
void manyheads_attend(const shape *s, const trees *g, const float *qkv, const float *keys, const float *values,
                      float *y, int64_t window) {
    const int64_t group = s->heads / s->kv_heads, tokens = g->row_start[g->rows];
#pragma omp parallel for if (tokens * s->heads * s->dim * g->max_cached_len > WORTHWHILE)
    for (int64_t task = 0; task < tokens * s->kv_heads; task++) {
        const int64_t t = task / s->kv_heads, kv_head = task % s->kv_heads;
        int64_t row = 0;
        while (g->row_start[row + 1] <= t) row++;
        const float *q = qkv + (t * (s->heads + 2 * s->kv_heads) + kv_head * group) * s->dim;
        float *out = y + (t * s->heads + kv_head * group) * s->dim;
        switch (s->dim) {  // loops of a length that the compiler knows take half the time
            case 64: attend(s, g, q, keys, values, out, row, t, window, kv_head, 64); break;
            case 128: attend(s, g, q, keys, values, out, row, t, window, kv_head, 128); break;
            default: attend(s, g, q, keys, values, out, row, t, window, kv_head, s->dim);
        }
    }
}
