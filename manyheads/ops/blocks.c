// y = x W^T in float32, where a weight comes in blocks of 32 columns of a row:
//
//     w = fma(code, scale, minimum)
//
// so each is widened in a register, once for up to 8 rows of x. A row's sums are made in the same order whatever other
// rows are there. In blocks of 4 bits, 16 bytes hold the first 16 codes in their low halves and the others in the high
// ones; in blocks of 8 bits, codes are signed bytes and there are no minima.
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 32
#define HALF 16
#define MOST 8

typedef float floats __attribute__((vector_size(4 * HALF)));
typedef int32_t ints __attribute__((vector_size(4 * HALF)));
typedef uint8_t bytes __attribute__((vector_size(HALF)));
typedef int8_t signed_bytes __attribute__((vector_size(HALF)));

typedef struct {
    const float *x;        // [rows, into]
    const uint8_t *codes;  // [out, into / 2] or [out, into]
    const float *scales;   // [out, into / 32]
    const float *minima;   // the same, or nothing
    float *y;              // [rows, out]
    int64_t rows, out, into;
} product;

// 16 unsigned or signed bytes as numbers of 32 bits; compilers find this instruction by themselves in few versions.
static inline ints widen_unsigned(bytes value) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu8_epi32((__m128i)value);
#else
    return __builtin_convertvector(value, ints);
#endif
}

static inline ints widen_signed(signed_bytes value) {
#ifdef __AVX512F__
    return (ints)_mm512_cvtepi8_epi32((__m128i)value);
#else
    return __builtin_convertvector(value, ints);
#endif
}

static inline floats load(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline __attribute__((always_inline)) void widen(const product *p, int bits, int64_t block, floats *half) {
    const float scale = p->scales[block];
    if (bits == 4) {
        bytes both;
        memcpy(&both, p->codes + block * HALF, sizeof both);
        ints wide = widen_unsigned(both);
        half[0] = __builtin_convertvector(wide & 15, floats) * scale + p->minima[block];
        half[1] = __builtin_convertvector(wide >> 4, floats) * scale + p->minima[block];
    } else {
        signed_bytes first, second;
        memcpy(&first, p->codes + block * BLOCK, sizeof first);
        memcpy(&second, p->codes + block * BLOCK + HALF, sizeof second);
        half[0] = __builtin_convertvector(widen_signed(first), floats) * scale;
        half[1] = __builtin_convertvector(widen_signed(second), floats) * scale;
    }
}

// Some outputs of `count` rows from row `at` on.
static inline __attribute__((always_inline)) void some(const product *p, int bits, int count, int64_t at,
                                                       int64_t start, int64_t stop) {
    const float *x = p->x + at * p->into;
    int64_t blocks = p->into / BLOCK;
    for (int64_t o = start; o < stop; o++) {
        floats sum[MOST] = {0};
        for (int64_t b = 0; b < blocks; b++) {
            floats half[2];
            widen(p, bits, o * blocks + b, half);
            for (int r = 0; r < count; r++) {
                sum[r] += half[0] * load(x + r * p->into + b * BLOCK);
                sum[r] += half[1] * load(x + r * p->into + b * BLOCK + HALF);
            }
        }
        for (int r = 0; r < count; r++) {
            float total = 0;
            for (int i = 0; i < HALF; i++) total += sum[r][i];
            p->y[(at + r) * p->out + o] = total;
        }
    }
}

static inline __attribute__((always_inline)) void all(const product *p, int bits, int64_t start, int64_t stop) {
    int64_t at = 0;
    for (; p->rows - at >= 8; at += 8) some(p, bits, 8, at, start, stop);
    switch (p->rows - at) {
        case 7: some(p, bits, 7, at, start, stop); break;
        case 6: some(p, bits, 6, at, start, stop); break;
        case 5: some(p, bits, 5, at, start, stop); break;
        case 4: some(p, bits, 4, at, start, stop); break;
        case 3: some(p, bits, 3, at, start, stop); break;
        case 2: some(p, bits, 2, at, start, stop); break;
        case 1: some(p, bits, 1, at, start, stop); break;
    }
}

void manyheads_blocks(const float *x, const uint8_t *codes, const float *scales, const float *minima, float *y,
                      int64_t rows, int64_t out, int64_t into) {
    product p = {x, codes, scales, minima, y, rows, out, into};
    const int64_t step = 64;
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < out; start += step) {
        int64_t stop = start + step < out ? start + step : out;
        if (minima) all(&p, 4, start, stop);
        else all(&p, 8, start, stop);
    }
}
