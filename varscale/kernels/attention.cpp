// Block-causal self-attention of short sequences with few channels a head, on a CPU, forward and backward.
//
// PyTorch's kernels spend most of their time around the arithmetic when a head has 4 to 32 channels. Here one (sample, head)
// stays in the first-level cache: keys and values are laid out channel by channel, so that a vector holds one channel of
// neighbouring tokens, and several queries share what is loaded. Pairs that the mask hides are never computed. Where NORMALISED
// says so, queries and keys are given length 1 on the way in, and the gradient of that is taken on the way out. Heads of 32
// or 64 channels leave that cache; they are summed up over tokens row by row, since a row is whole vectors.
//
// Layouts, row-major: joint (batch, tokens, 3, heads, CHANNELS) holds queries, keys and values; output and its gradient
// (batch, tokens, heads, CHANNELS); log_sum (batch, heads, tokens); scale (heads); scale_gradient (batch, heads).
// ends[k] is where the tokens of scale k end; a token sees all tokens before the end of its own scale. The forward pass can
// leave out the queries before `first`, and the samples of `joint` can lie `capacity` tokens apart: so it reads a cache.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "vectors.h"

constexpr int CHANNELS = HEAD_CHANNELS;  // these two are given on the compiler's command line
constexpr bool UNIT_LENGTH = NORMALISED;
constexpr float SMALLEST_SQUARE = 1e-24f;
constexpr int CHUNK = 8;   // sums that fit into the registers beside what is added to them
constexpr bool WIDE = CHANNELS >= 32 && CHANNELS % (2 * LANES) == 0;  // a row is pairs of whole vectors
constexpr int GROUP = WIDE && LANES == 16 ? 8 : 4;  // queries that share what is loaded; more were slower

namespace {

inline Integers hidden_lanes(int64_t block, int64_t visible) {
    Integers index;
    for (int i = 0; i < LANES; i++) index[i] = i;
    return index + (int32_t)(block * LANES) >= (int32_t)visible;
}

// What a query or key is multiplied by before all else.
inline float inverse_length(const float *row) {
    if constexpr (!UNIT_LENGTH) return 1.0f;
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int c = 0; c < CHANNELS; c++) square += row[c] * row[c];
    return 1.0f / std::sqrt(square > SMALLEST_SQUARE ? square : SMALLEST_SQUARE);
}

// Neighbouring tokens' rows to one vector a channel, with zeros where there are fewer tokens than lanes, and back.
inline void to_columns(const float *rows, int64_t stride, int64_t count, Vector *columns) {
    if constexpr (WIDE) {
        for (int c = 0; c < CHANNELS; c += LANES) {
            for (int i = 0; i < LANES; i++) columns[c + i] = i < count ? load_vector(rows + i * stride + c) : Vector{};
            transpose(columns + c);
        }
    } else {
        alignas(64) float lanes[CHANNELS][LANES];
        if (count < LANES) memset(lanes, 0, sizeof lanes);
        for (int64_t i = 0; i < count; i++)
            for (int c = 0; c < CHANNELS; c++) lanes[c][i] = rows[i * stride + c];
        memcpy(columns, lanes, sizeof lanes);
    }
}
inline void to_rows(Vector *columns, float *rows, int64_t stride, int64_t count) {
    if constexpr (WIDE) {
        for (int c = 0; c < CHANNELS; c += LANES) {
            transpose(columns + c);
            for (int i = 0; i < count; i++) store(columns[c + i], rows + i * stride + c);
        }
    } else {
        alignas(64) float lanes[CHANNELS][LANES];
        memcpy(lanes, columns, sizeof lanes);
        for (int64_t i = 0; i < count; i++)
            for (int c = 0; c < CHANNELS; c++) rows[i * stride + c] = lanes[c][i];
    }
}

// What one thread works in: [block of tokens][channel] for keys, values and their gradients, [query][block] for weights
// and the gradients of logits, [token][channels] for the rows that are summed up over tokens.
struct Scratch {
    int64_t blocks;
    Vector *keys, *values, *key_gradient, *value_gradient, *weights, *logit_gradient, *key_inverse_length;
    float *rows;

    explicit Scratch(int64_t tokens) : blocks((tokens + LANES - 1) / LANES) {
        const int64_t map = blocks * CHANNELS;
        const int64_t vectors = (WIDE ? 5 : 4) * map + (2 * GROUP + 1) * blocks;
        keys = (Vector *)aligned_alloc(64, (sizeof(Vector) * vectors + 63) / 64 * 64);
        values = keys + map;
        key_gradient = values + map;
        value_gradient = key_gradient + map;
        weights = value_gradient + map;
        logit_gradient = weights + GROUP * blocks;
        key_inverse_length = logit_gradient + GROUP * blocks;
        rows = (float *)(key_inverse_length + blocks);
    }
    ~Scratch() { free(keys); }

    // keys may be normalised, values are not
    void load(const float *key_rows, const float *value_rows, int64_t stride, int64_t tokens) {
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * LANES, count = tokens - first < LANES ? tokens - first : LANES;
            Vector *key = keys + b * CHANNELS, square = all(0), inverse;
            to_columns(key_rows + first * stride, stride, count, key);
            to_columns(value_rows + first * stride, stride, count, values + b * CHANNELS);
            if constexpr (!UNIT_LENGTH) {
                key_inverse_length[b] = all(1);
                continue;
            }
            for (int c = 0; c < CHANNELS; c++) square += key[c] * key[c];
            square = square > SMALLEST_SQUARE ? square : all(SMALLEST_SQUARE);
            for (int i = 0; i < LANES; i++) inverse[i] = 1.0f / std::sqrt(square[i]);
            key_inverse_length[b] = inverse;
            for (int c = 0; c < CHANNELS; c++) key[c] *= inverse;
        }
    }

    // Only wide heads are summed up by rows.
    void load_rows(const float *from, int64_t stride, int64_t tokens, const float *factors) {
        if constexpr (WIDE)
            for (int64_t t = 0; t < tokens; t++)
                for (int c = 0; c < CHANNELS; c++)
                    rows[t * CHANNELS + c] = factors ? from[t * stride + c] * factors[t] : from[t * stride + c];
    }

    void store_gradients(float *key_rows, float *value_rows, int64_t stride, int64_t tokens) {
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = b * LANES, count = tokens - first < LANES ? tokens - first : LANES;
            const Vector *key = keys + b * CHANNELS, *gradient = key_gradient + b * CHANNELS;
            Vector key_result[CHANNELS], along = all(0);
            for (int c = 0; c < CHANNELS && UNIT_LENGTH; c++) along += gradient[c] * key[c];
            for (int c = 0; c < CHANNELS; c++) key_result[c] = key_inverse_length[b] * (gradient[c] - along * key[c]);
            to_rows(key_result, key_rows + first * stride, stride, count);
            to_rows(value_gradient + b * CHANNELS, value_rows + first * stride, stride, count);
        }
    }
};

// The products of ROWS queries' rows with the columns of BLOCKS blocks of tokens: their logits, with keys as columns.
template <int ROWS, int BLOCKS>
inline void products(const Vector *columns, const float (*rows)[CHANNELS], Vector (&result)[ROWS][BLOCKS]) {
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BLOCKS; b++) result[r][b] = Vector{};
    for (int c = 0; c < CHANNELS; c++)
        for (int b = 0; b < BLOCKS; b++)
            for (int r = 0; r < ROWS; r++) result[r][b] += columns[b * CHANNELS + c] * rows[r][c];
}

// Adds to the columns of BLOCKS blocks what ROWS queries' rows times their factors at these tokens sum up to.
template <int ROWS, int BLOCKS>
inline void add_products(const Vector *factors, int64_t blocks, const float (*rows)[CHANNELS], Vector *columns) {
    Vector factor[ROWS][BLOCKS];
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BLOCKS; b++) factor[r][b] = factors[r * blocks + b];
    for (int c = 0; c < CHANNELS; c++)
        for (int b = 0; b < BLOCKS; b++) {
            Vector sum = columns[b * CHANNELS + c];
            for (int r = 0; r < ROWS; r++) sum += factor[r][b] * rows[r][c];
            columns[b * CHANNELS + c] = sum;
        }
}

// For ROWS queries, `to(query, channel, sum)` of the sums over tokens of factors times columns; as many channels at a
// time, COUNT, as registers allow.
template <int ROWS, int COUNT, typename Store>
inline void sums_of_columns(const Vector *factors, int64_t blocks, const Vector *columns, int64_t used, int first,
                            Store to) {
    for (; first + COUNT <= CHANNELS; first += COUNT) {
        Vector weighted[ROWS * COUNT];
        float sums[ROWS * COUNT];
        for (int i = 0; i < ROWS * COUNT; i++) weighted[i] = Vector{};
        for (int64_t b = 0; b < used; b++)
            for (int c = 0; c < COUNT; c++)
                for (int r = 0; r < ROWS; r++)
                    weighted[r * COUNT + c] += factors[r * blocks + b] * columns[b * CHANNELS + first + c];
        reduce<ROWS * COUNT>(weighted, sums, add);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COUNT; c++) to(r, first + c, sums[r * COUNT + c]);
    }
    if constexpr (COUNT > 1)
        if (first < CHANNELS) sums_of_columns<ROWS, COUNT / 2>(factors, blocks, columns, used, first, to);
}

// The same with rows, and sums of LANES channels: nothing is left to be added up across lanes.
template <int ROWS, typename Store>
inline void sums_of_rows(const float *factors, int64_t stride, const float *rows, int64_t tokens, Store to) {
    for (int c = 0; c < CHANNELS; c += 2 * LANES) {
        Vector sum[ROWS][2];
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = Vector{};
        for (int64_t t = 0; t < tokens; t++)
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < 2; i++)
                    sum[r][i] += load_vector(rows + t * CHANNELS + c + i * LANES) * factors[r * stride + t];
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < 2; i++) to(r, c + i * LANES, sum[r][i]);
    }
}

// The sums of factors times values or keys over the tokens that ROWS queries see, to `to`.
template <int ROWS, typename Store>
inline void sums_over_tokens(const Vector *factors, const Scratch &s, const Vector *columns, int64_t visible, Store to) {
    if constexpr (WIDE)
        sums_of_rows<ROWS>((const float *)factors, s.blocks * LANES, s.rows, visible, to);
    else
        sums_of_columns<ROWS, CHUNK / ROWS>(factors, s.blocks, columns, (visible + LANES - 1) / LANES, 0, to);
}

// The outputs of ROWS neighbouring queries that see the first `visible` tokens.
template <int ROWS>
[[gnu::noinline]] void forward_rows(const float *query_row, int64_t stride, int64_t visible, float scale, Scratch &s,
                                    float *output, int64_t output_stride, float *log_sum) {
    const int64_t used = (visible + LANES - 1) / LANES;
    float query[ROWS][CHANNELS];
    Vector most[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const float factor = scale * inverse_length(query_row + r * stride);
        for (int c = 0; c < CHANNELS; c++) query[r][c] = query_row[r * stride + c] * factor;
        most[r] = all(-INFINITY);
    }
    const Integers hidden = hidden_lanes(used - 1, visible);
    Vector *weights = s.weights;
    int64_t b = 0;
    for (; b + 2 <= used; b += 2) {
        Vector logit[ROWS][2];
        products<ROWS, 2>(s.keys + b * CHANNELS, query, logit);
        for (int r = 0; r < ROWS; r++) {
            weights[r * s.blocks + b] = logit[r][0];
            weights[r * s.blocks + b + 1] = logit[r][1];
        }
    }
    if (b < used) {
        Vector logit[ROWS][1];
        products<ROWS, 1>(s.keys + b * CHANNELS, query, logit);
        for (int r = 0; r < ROWS; r++) weights[r * s.blocks + b] = logit[r][0];
    }
    for (int r = 0; r < ROWS; r++) {
        Vector &last = weights[r * s.blocks + used - 1];
        last = hidden ? all(-INFINITY) : last;
        for (b = 0; b < used; b++) most[r] = weights[r * s.blocks + b] > most[r] ? weights[r * s.blocks + b] : most[r];
    }
    float top[ROWS], normaliser[ROWS];
    Vector total[ROWS];
    reduce<ROWS>(most, top, larger);
    for (int r = 0; r < ROWS; r++) total[r] = Vector{};
    for (b = 0; b < used; b++)
        for (int r = 0; r < ROWS; r++) {
            Vector weight = exponential(weights[r * s.blocks + b] - top[r]);
            if (b == used - 1) weight = hidden ? Vector{} : weight;
            weights[r * s.blocks + b] = weight;
            total[r] += weight;
        }
    reduce<ROWS>(total, normaliser, add);
    for (int r = 0; r < ROWS; r++) log_sum[r] = top[r] + std::log(normaliser[r]);
    sums_over_tokens<ROWS>(weights, s, s.values, visible, [&](int r, int c, auto sum) {
        store(sum / normaliser[r], output + r * output_stride + c);
    });
}

// Adds to the gradients of keys and values, writes those of ROWS queries, and returns that of the scale.
template <int ROWS>
[[gnu::noinline]] float backward_rows(const float *query_row, int64_t stride, int64_t visible, float scale, Scratch &s,
                                      const float *output, const float *output_gradient, int64_t output_stride,
                                      const float *log_sum, float *query_gradient) {
    const int64_t used = (visible + LANES - 1) / LANES;
    float query[ROWS][CHANNELS], incoming[ROWS][CHANNELS], inverse[ROWS], dot[ROWS];
    for (int r = 0; r < ROWS; r++) {
        inverse[r] = inverse_length(query_row + r * stride);
        float product = 0;
#pragma omp simd reduction(+ : product)
        for (int c = 0; c < CHANNELS; c++) {
            query[r][c] = query_row[r * stride + c] * inverse[r] * scale;
            incoming[r][c] = output_gradient[r * output_stride + c];
            product += incoming[r][c] * output[r * output_stride + c];
        }
        dot[r] = product;
    }
    const Integers hidden = hidden_lanes(used - 1, visible);
    const auto blocks = [&](int64_t b, auto count) {
        constexpr int BLOCKS = decltype(count)::value;
        Vector weight[ROWS][BLOCKS], gradient[ROWS][BLOCKS];
        products<ROWS, BLOCKS>(s.keys + b * CHANNELS, query, weight);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < BLOCKS; i++) {
                weight[r][i] = exponential(weight[r][i] - log_sum[r]);
                if (b + i == used - 1) weight[r][i] = hidden ? Vector{} : weight[r][i];
                s.weights[r * s.blocks + b + i] = weight[r][i];
            }
        products<ROWS, BLOCKS>(s.values + b * CHANNELS, incoming, gradient);
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < BLOCKS; i++)
                s.logit_gradient[r * s.blocks + b + i] = s.weights[r * s.blocks + b + i] * (gradient[r][i] - dot[r]);
        add_products<ROWS, BLOCKS>(s.logit_gradient + b, s.blocks, query, s.key_gradient + b * CHANNELS);
        add_products<ROWS, BLOCKS>(s.weights + b, s.blocks, incoming, s.value_gradient + b * CHANNELS);
    };
    int64_t b = 0;
    for (; b + 2 <= used; b += 2) blocks(b, std::integral_constant<int, 2>());
    if (b < used) blocks(b, std::integral_constant<int, 1>());
    float flat[ROWS][CHANNELS];
    sums_over_tokens<ROWS>(s.logit_gradient, s, s.keys, visible,
                           [&](int r, int c, auto sum) { store(sum, flat[r] + c); });
    float scale_gradient = 0;
    for (int r = 0; r < ROWS; r++) {
        const float *raw = query_row + r * stride;
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int c = 0; c < CHANNELS; c++) along += flat[r][c] * raw[c] * inverse[r];
        scale_gradient += along;
        const float lengthwise = UNIT_LENGTH ? along * inverse[r] : 0;
        for (int c = 0; c < CHANNELS; c++)
            query_gradient[r * stride + c] = scale * inverse[r] * (flat[r][c] - lengthwise * raw[c]);
    }
    return scale_gradient;
}

// Calls `work(first query, tokens they see, how many)` for all queries from `first` on, as many at a time as may be.
template <typename Work>
inline void in_groups(int64_t first, const int64_t *ends, int64_t scales, Work work) {
    for (int64_t k = 0, t = first; k < scales; k++) {
        for (; t + GROUP <= ends[k]; t += GROUP) work(t, ends[k], std::integral_constant<int, GROUP>());
        if constexpr (GROUP > 4)
            for (; t + 4 <= ends[k]; t += 4) work(t, ends[k], std::integral_constant<int, 4>());
        for (; t < ends[k]; t++) work(t, ends[k], std::integral_constant<int, 1>());
    }
}

}  // namespace

extern "C" void attention_forward(const float *joint, const float *scale, float *output, float *log_sum, int64_t batch,
                                  int64_t heads, const int64_t *ends, int64_t scales, int64_t threads, int64_t first,
                                  int64_t capacity) {
    const int64_t tokens = ends[scales - 1], width = heads * CHANNELS, stride = 3 * width, queries = tokens - first;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(tokens);
#pragma omp for
        for (int64_t n = 0; n < batch * heads; n++) {
            const int64_t head = n % heads, sample = n / heads;
            const float *rows = joint + sample * capacity * stride + head * CHANNELS;
            float *outputs = output + (sample * queries - first) * width + head * CHANNELS;
            float *log_sums = log_sum + n * queries - first;
            scratch.load(rows + width, rows + 2 * width, stride, tokens);
            scratch.load_rows(rows + 2 * width, stride, tokens, nullptr);
            in_groups(first, ends, scales, [&](int64_t t, int64_t visible, auto count) {
                forward_rows<count>(rows + t * stride, stride, visible, scale[head], scratch, outputs + t * width,
                                    width, log_sums + t);
            });
        }
    }
}

extern "C" void attention_backward(const float *joint, const float *scale, const float *output, const float *log_sum,
                                   const float *output_gradient, float *joint_gradient, float *scale_gradient,
                                   int64_t batch, int64_t heads, const int64_t *ends, int64_t scales, int64_t threads) {
    const int64_t tokens = ends[scales - 1], width = heads * CHANNELS, stride = 3 * width;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(tokens);
#pragma omp for
        for (int64_t n = 0; n < batch * heads; n++) {
            const int64_t head = n % heads, first = n / heads * tokens;
            const float *rows = joint + first * stride + head * CHANNELS;
            const float *outputs = output + first * width + head * CHANNELS;
            const float *incoming = output_gradient + first * width + head * CHANNELS;
            float *gradients = joint_gradient + first * stride + head * CHANNELS;
            scratch.load(rows + width, rows + 2 * width, stride, tokens);
            scratch.load_rows(rows + width, stride, tokens, (const float *)scratch.key_inverse_length);
            memset(scratch.key_gradient, 0, sizeof(Vector) * 2 * scratch.blocks * CHANNELS);
            float total = 0;
            in_groups(0, ends, scales, [&](int64_t t, int64_t visible, auto count) {
                total += backward_rows<count>(rows + t * stride, stride, visible, scale[head], scratch,
                                              outputs + t * width, incoming + t * width, width,
                                              log_sum + n * tokens + t, gradients + t * stride);
            });
            scale_gradient[n] = total;
            scratch.store_gradients(gradients + width, gradients + 2 * width, stride, tokens);
        }
    }
}
