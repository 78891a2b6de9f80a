// y = x W^T in float32, where a weight comes in blocks of 32 columns of a row, each with a scale and perhaps a minimum:
//
//     w = code * scale + minimum
//
// 16 outputs, a tile, stand side by side as the lanes of a vector: a column's codes are made numbers once for up to 8
// rows of x, and multiplied with what each row has at that column. So nothing is added up across lanes, and scales and
// minima are multiplied with once a block. A row's sums are made in the same order whatever other rows are there.
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 32
#define LANES 16
#define ROWS 8
#define TILES 4     // that a thread takes at a time
#define AHEAD 4096  // bytes from what is read to what is asked for

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

// Blocks of a tile stand side by side, and tiles behind each other, in the order in which they are read. A block holds
//
//     codes    [bits, 16] int32; an output's columns from the lowest bits of its words on, signed: those of 4 bits are
//              8 less than what they stand for, so that sums stay small
//     scale    [16], float16 if the numbers are halves, else float
//     minimum  the same, of codes of 4 bits
typedef struct {
    const char *blocks;
    int are_halves;
    int64_t out, into;
} weight;

typedef struct {
    const float *x;     // [rows, into], up to 8 rows
    const float *sums;  // [rows, blocks], of the numbers of a block
    float *y;           // [rows, out]
} activations;

#define INLINE static inline __attribute__((always_inline))

// Scales or minima of a block.
INLINE floats load(const char *from, int are_halves) {
    floats value;
    halves half;
    if (!are_halves) {
        memcpy(&value, from, sizeof value);
        return value;
    }
    memcpy(&half, from, sizeof half);
#ifdef __AVX512F__
    return (floats)_mm512_cvtph_ps((__m256i)half);
#else
    ints bits = __builtin_convertvector(half, ints);
    // the exponent counts from another number, which the product puts right, of subnormal numbers too
    value = (floats)((bits & 0x7fff) << 13) * 0x1p112f;
    return (floats)((ints)value | (bits & 0x8000) << 16);
#endif
}

// The code of one column, of those that a word holds.
INLINE floats number(ints word, int bits, int column) {
#ifdef __AVX512F__
    const floats table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    if (bits == 4) return (floats)_mm512_permutexvar_ps((__m512i)(word >> 4 * column), (__m512)table);  // by 4 bits
#endif
    return __builtin_convertvector(word << (32 - bits * (column + 1)) >> (32 - bits), floats);
}

INLINE void tile(const weight *w, const activations *a, int64_t t, int bits, int rows) {
    const int64_t into = w->into, blocks = into / BLOCK;
    const int columns = 32 / bits;  // in a word
    const int numbers = w->are_halves ? sizeof(halves) : sizeof(floats);
    const int size = bits * sizeof(ints) + (bits == 4 ? 2 : 1) * numbers;
    const char *block = w->blocks + t * blocks * size;
    const float *x = a->x;
    floats total[ROWS] = {0};
    for (int64_t b = 0; b < blocks; b++, block += size) {
        floats even[ROWS] = {0}, odd[ROWS] = {0};
        for (int j = 0; j < bits; j++, x += columns) {
            ints word;
            memcpy(&word, block + j * sizeof word, sizeof word);
            __builtin_prefetch(block + j * sizeof word + AHEAD);
#pragma GCC unroll 8
            for (int k = 0; k < columns; k += 2) {
                floats first = number(word, bits, k), second = number(word, bits, k + 1);
                for (int r = 0; r < rows; r++) {
                    even[r] += first * x[r * into + k];
                    odd[r] += second * x[r * into + k + 1];
                }
            }
        }
        const char *behind = block + bits * sizeof(ints);
        __builtin_prefetch(behind + AHEAD);
        floats scale = load(behind, w->are_halves);
        for (int r = 0; r < rows; r++) total[r] += (even[r] + odd[r]) * scale;
        if (bits == 8) continue;
        floats middle = load(behind + numbers, w->are_halves) + 8 * scale;
        for (int r = 0; r < rows; r++) total[r] += middle * a->sums[r * blocks + b];
    }
    int64_t left = w->out - t * LANES;
    for (int r = 0; r < rows; r++)
        memcpy(a->y + r * w->out + t * LANES, &total[r], (left < LANES ? left : LANES) * sizeof(float));
}

INLINE void tiles(const weight *w, const activations *a, int64_t t, int bits, int rows) {
    switch (rows) {
        case 1: tile(w, a, t, bits, 1); break;
        case 2: tile(w, a, t, bits, 2); break;
        case 3: tile(w, a, t, bits, 3); break;
        case 4: tile(w, a, t, bits, 4); break;
        case 5: tile(w, a, t, bits, 5); break;
        case 6: tile(w, a, t, bits, 6); break;
        case 7: tile(w, a, t, bits, 7); break;
        case 8: tile(w, a, t, bits, 8); break;
    }
}

void manyheads_blocks(const float *x, const char *weights, float *y, int64_t rows, int bits, int are_halves,
                      int64_t out, int64_t into) {
    const weight w = {weights, are_halves, out, into};
    const int64_t blocks = into / BLOCK, count = (out + LANES - 1) / LANES;
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < count; start += TILES) {
        int64_t stop = start + TILES < count ? start + TILES : count;
        float sums[ROWS * blocks];
        for (int64_t at = 0; at < rows; at += ROWS) {
            int some = rows - at < ROWS ? rows - at : ROWS;
            const activations a = {x + at * into, sums, y + at * out};
            for (int64_t i = 0; bits == 4 && i < some * blocks; i++) {
                floats half[2];
                memcpy(half, a.x + i * BLOCK, sizeof half);
                half[0] += half[1];
                sums[i] = 0;
                for (int k = 0; k < LANES; k++) sums[i] += half[0][k];
            }
            for (int64_t t = start; t < stop; t++) {
                if (bits == 4) tiles(&w, &a, t, 4, some);
                else tiles(&w, &a, t, 8, some);
            }
        }
    }
}
