// Vectors as wide as the processor has them, and what crosses their lanes: sums, maxima, transposition.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && (!defined(MOST_LANES) || MOST_LANES >= 16)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

namespace {

inline Vector all(float value) { return value - Vector{}; }

// Folds pairs of lane groups: of each group of 2 * WIDTH lanes, its halves are combined; first's and second's alternate.
template <int WIDTH, typename Combine>
inline Vector fold(Vector first, Vector second, Combine combine) {
    Integers low, high;
    for (int i = 0; i < LANES; i++) {
        const int group = i / WIDTH, lane = group / 2 * 2 * WIDTH + i % WIDTH + (group % 2 ? LANES : 0);
        low[i] = lane;
        high[i] = lane + WIDTH;
    }
    return combine(__builtin_shuffle(first, second, low), __builtin_shuffle(first, second, high));
}

template <int COUNT, int WIDTH, typename Combine>
inline Vector fold_all(const Vector *vectors, Combine combine) {
    if constexpr (WIDTH == 0) {
        return vectors[0];
    } else if constexpr (COUNT == 1) {
        const Vector folded = fold<WIDTH>(vectors[0], vectors[0], combine);
        return fold_all<1, WIDTH / 2>(&folded, combine);
    } else {
        Vector folded[(COUNT + 1) / 2];
        for (int i = 0; i < COUNT / 2; i++) folded[i] = fold<WIDTH>(vectors[2 * i], vectors[2 * i + 1], combine);
        if (COUNT % 2) folded[COUNT / 2] = fold<WIDTH>(vectors[COUNT - 1], vectors[COUNT - 1], combine);
        return fold_all<(COUNT + 1) / 2, WIDTH / 2>(folded, combine);
    }
}

// Combines the lanes of each of COUNT vectors into one number: all at once, in a tree.
template <int COUNT, typename Combine>
inline void reduce(const Vector *vectors, float *results, Combine combine) {
    if constexpr (COUNT > LANES) {
        reduce<LANES>(vectors, results, combine);
        reduce<COUNT - LANES>(vectors + LANES, results + LANES, combine);
    } else {
        const Vector folded = fold_all<COUNT, LANES / 2>(vectors, combine);
        for (int n = 0; n < COUNT; n++) {
            int lane = 0;  // each halving put the last bit of the vector's number in front
            for (int width = LANES / 2, rest = n; width; width /= 2, rest /= 2) lane += rest % 2 * width;
            results[n] = folded[lane];
        }
    }
}
const auto add = [](Vector a, Vector b) { return a + b; };
const auto larger = [](Vector a, Vector b) { return a > b ? a : b; };

// e^x = 2^whole times what is returned, of numbers or of vectors of them (Cephes' polynomial)
template <typename Number>
inline Number exponential_series(Number x, Number &whole) {
    const Number magic = 12582912.0f - Number{};  // adding 1.5 * 2^23 rounds to whole numbers
    whole = (x * 1.44269504088896341f + magic) - magic;
    const Number rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Number series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    return series * (rest * rest) + rest + 1.0f;
}

// e^x for x <= 0, to 2e-7; below -87 it is taken for e^-87, about 1e-38
inline Vector exponential(Vector x) {
    Vector whole;
    const Vector series = exponential_series<Vector>(x < -87.0f ? all(-87.0f) : x, whole);
    const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return series * (Vector)exponent;
}

inline Vector load_vector(const float *from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}
inline void store(const Vector &vector, float *to) { memcpy(to, &vector, sizeof vector); }
inline void store(float number, float *to) { *to = number; }

// Exchanges vectors and lanes of LANES vectors, by halves, then by halves of these.
template <int WIDTH = LANES / 2>
inline void transpose(Vector *square) {
    if constexpr (WIDTH > 0) {
        Integers low, high;
        for (int i = 0; i < LANES; i++) {
            low[i] = i & WIDTH ? LANES + i - WIDTH : i;
            high[i] = i & WIDTH ? LANES + i : i + WIDTH;
        }
        for (int i = 0; i < LANES; i++)
            if (!(i & WIDTH)) {
                const Vector first = square[i], second = square[i + WIDTH];
                square[i] = __builtin_shuffle(first, second, low);
                square[i + WIDTH] = __builtin_shuffle(first, second, high);
            }
        transpose<WIDTH / 2>(square);
    }
}

}  // namespace
