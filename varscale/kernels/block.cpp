// A whole transformer block on a CPU, forward and backward: what is narrow spends its time around the arithmetic otherwise.
//
// Layouts, row-major: x, output (batch, tokens, WIDTH); modulation (batch, 6, WIDTH): gates, scales and shifts, of attention
// and of the feed-forward layers each. Weights as PyTorch keeps them, (outputs, inputs). WIDTH and HIDDEN are whole vectors.
// Every sum is taken in one order whatever the number of threads.

#include "attention.cpp"

namespace {

constexpr float EPSILON = 1e-6f;
constexpr int ROWS = 4;     // with three vectors of columns, the sums fill the registers
constexpr int COLUMNS = 3;
constexpr int64_t DEPTH = 64;  // rows that are summed up at a time: they stay in the first-level cache

// result = a · b + first, where a(i, k) lies at a[i * row_step + k * step] and b (depth, columns) is row-major; the rows of
// `first` lie first_step apart: 0 for a bias, and none of it is zeros
template <int R, int V>
inline void tile(const float *a, int64_t row_step, int64_t step, const float *b, int64_t depth, int64_t columns,
                 const float *first, int64_t first_step, float *result) {
    Vector sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = first ? load_vector(first + r * first_step + v * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++, a += step, b += columns)
        for (int v = 0; v < V; v++) {
            const Vector loaded = load_vector(b + v * LANES);
            for (int r = 0; r < R; r++) sum[r][v] += loaded * a[r * row_step];
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(sum[r][v], result + r * columns + v * LANES);
}

template <int R>
inline void stripe(const float *a, int64_t row_step, int64_t step, const float *b, int64_t depth, int64_t columns,
                   const float *first, int64_t first_step, float *result) {
    for (int64_t c = 0; c < columns;) {
        const int64_t left = (columns - c) / LANES;
        const float *offset = first ? first + c : nullptr;
        if (left >= COLUMNS && left != 4) {
            tile<R, 3>(a, row_step, step, b + c, depth, columns, offset, first_step, result + c);
            c += 3 * LANES;
        } else if (left >= 2) {
            tile<R, 2>(a, row_step, step, b + c, depth, columns, offset, first_step, result + c);
            c += 2 * LANES;
        } else {
            tile<R, 1>(a, row_step, step, b + c, depth, columns, offset, first_step, result + c);
            c += LANES;
        }
    }
}

void product(const float *a, int64_t row_step, int64_t step, const float *b, int64_t rows, int64_t depth, int64_t columns,
             const float *bias, float *result, int64_t threads) {
    const int64_t whole = rows / ROWS, at_once = row_step == 1 ? DEPTH : depth;
    for (int64_t k = 0; k < depth; k += at_once, a += at_once * step, b += at_once * columns) {
        const int64_t count = depth - k < at_once ? depth - k : at_once, first_step = k ? columns : 0;
        const auto some = [&](int64_t i, auto rows_at_once) {
            const float *first = k ? result + i * columns : bias;
            stripe<rows_at_once>(a + i * row_step, row_step, step, b, count, columns, first, first_step, result + i * columns);
        };
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < whole; i++) some(i * ROWS, std::integral_constant<int, ROWS>());
        for (int64_t i = whole * ROWS; i < rows; i++) some(i, std::integral_constant<int, 1>());
    }
}

// x (rows, inputs) · weight (outputs, inputs)ᵀ + bias
void linear(const float *x, const float *weight, const float *bias, int64_t rows, int64_t inputs, int64_t outputs,
            float *space, float *result, int64_t threads) {
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t i = 0; i < inputs; i++) space[i * outputs + o] = weight[o * inputs + i];
    product(x, inputs, 1, space, rows, inputs, outputs, bias, result, threads);
}

// Gradients of `linear`: of its input, its weight and its bias.
void linear_backward(const float *gradient, const float *x, const float *weight, int64_t rows, int64_t inputs,
                     int64_t outputs, float *x_gradient, float *weight_gradient, float *bias_gradient, int64_t threads) {
    product(gradient, outputs, 1, weight, rows, outputs, inputs, nullptr, x_gradient, threads);
    product(gradient, 1, outputs, x, outputs, rows, inputs, nullptr, weight_gradient, threads);
    memset(bias_gradient, 0, sizeof(float) * outputs);
    for (int64_t r = 0; r < rows; r++)
#pragma omp simd
        for (int64_t o = 0; o < outputs; o++) bias_gradient[o] += gradient[r * outputs + o];
}

void modulate(const float *x, const float *scale, const float *shift, int64_t tokens, int64_t width, float *out,
              float *statistics) {
    for (int64_t t = 0; t < tokens; t++, x += width, out += width, statistics += 2) {
        float mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < width; c++) mean += x[c];
        mean /= width;
#pragma omp simd reduction(+ : variance)
        for (int64_t c = 0; c < width; c++) variance += (x[c] - mean) * (x[c] - mean);
        const float inverse = 1.0f / std::sqrt(variance / width + EPSILON);
#pragma omp simd
        for (int64_t c = 0; c < width; c++) out[c] = (x[c] - mean) * inverse * (1.0f + scale[c]) + shift[c];
        statistics[0] = mean;
        statistics[1] = inverse;
    }
}

// Adds the gradient of x to what comes past the branch.
void modulate_backward(const float *x, const float *statistics, const float *scale, const float *gradient, int64_t tokens,
                       int64_t width, float *x_gradient, float *scale_gradient, float *shift_gradient) {
    memset(scale_gradient, 0, sizeof(float) * width);
    memset(shift_gradient, 0, sizeof(float) * width);
    for (int64_t t = 0; t < tokens; t++, x += width, gradient += width, x_gradient += width, statistics += 2) {
        const float mean = statistics[0], inverse = statistics[1];
        float total = 0, along = 0;
#pragma omp simd reduction(+ : total, along)
        for (int64_t c = 0; c < width; c++) {
            const float normalised = (x[c] - mean) * inverse, inner = gradient[c] * (1.0f + scale[c]);
            scale_gradient[c] += gradient[c] * normalised;
            shift_gradient[c] += gradient[c];
            total += inner;
            along += inner * normalised;
        }
        total /= width;
        along /= width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++)
            x_gradient[c] += inverse * (gradient[c] * (1.0f + scale[c]) - total - (x[c] - mean) * inverse * along);
    }
}

// GELU with the tanh approximation is h · logistic(2u), u = √(2/π)·(h + 0.044715·h³).
inline Vector logistic(Vector h) {
    Vector x = h * -1.5957691216057308f * (1.0f + 0.044715f * h * h);
    x = x < -40.0f ? all(-40.0f) : x;  // GELU would multiply by denormal numbers, a hundred times as slowly
    x = x > 40.0f ? all(40.0f) : x;
    Vector whole;
    const Vector series = exponential_series<Vector>(x, whole);
    const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return 1.0f / (1.0f + series * (Vector)exponent);
}

// out = x + gate · branch
void gated_add(const float *x, const float *branch, const float *gate, int64_t tokens, int64_t width, float *out) {
    for (int64_t t = 0; t < tokens; t++)
#pragma omp simd
        for (int64_t c = 0; c < width; c++) out[t * width + c] = x[t * width + c] + gate[c] * branch[t * width + c];
}

void gated_add_backward(const float *branch, const float *gate, const float *gradient, int64_t tokens, int64_t width,
                        float *branch_gradient, float *gate_gradient) {
    memset(gate_gradient, 0, sizeof(float) * width);
    for (int64_t t = 0; t < tokens; t++)
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            branch_gradient[t * width + c] = gate[c] * gradient[t * width + c];
            gate_gradient[c] += gradient[t * width + c] * branch[t * width + c];
        }
}

// Where each part begins in memory set aside for several.
struct Parts {
    float *next;
    float *take(int64_t count) { return (next += count) - count; }
};

// What the forward pass keeps; the same memory in the same order in both directions.
struct Kept {
    float *first, *joint, *attended, *projected, *middle, *second, *hidden, *activated, *contracted, *statistics, *log_sum;
    Kept(float *memory, int64_t rows, int64_t width, int64_t hidden_width) {
        Parts parts{memory};
        first = parts.take(rows * width);
        joint = parts.take(rows * 3 * width);
        attended = parts.take(rows * width);
        projected = parts.take(rows * width);
        middle = parts.take(rows * width);
        second = parts.take(rows * width);
        hidden = parts.take(rows * hidden_width);
        activated = parts.take(rows * hidden_width);
        contracted = parts.take(rows * width);
        statistics = parts.take(rows * 4);
        log_sum = parts.take(rows * (width / CHANNELS));
    }
};

}  // namespace

// weights: of queries_keys_values, projection, expand, contract, each followed by its bias
extern "C" void block_forward(const float *x, const float *modulation, const float *scale, const float *const *weights,
                              float *memory, float *space, float *output, int64_t batch, int64_t width, int64_t hidden,
                              const int64_t *ends, int64_t scales, int64_t threads) {
    const int64_t tokens = ends[scales - 1], rows = batch * tokens, heads = width / CHANNELS;
    const Kept kept(memory, rows, width, hidden);
    const auto samples = [&](auto work) {
#pragma omp parallel for num_threads(threads)
        for (int64_t b = 0; b < batch; b++) work(modulation + b * 6 * width, b * tokens * width, b * tokens);
    };
    samples([&](const float *m, int64_t at, int64_t row) {
        modulate(x + at, m + 2 * width, m + 4 * width, tokens, width, kept.first + at, kept.statistics + 2 * row);
    });
    linear(kept.first, weights[0], weights[1], rows, width, 3 * width, space, kept.joint, threads);
    attention_forward(kept.joint, scale, kept.attended, kept.log_sum, batch, heads, ends, scales, threads, 0, tokens);
    linear(kept.attended, weights[2], weights[3], rows, width, width, space, kept.projected, threads);
    samples([&](const float *m, int64_t at, int64_t row) {
        gated_add(x + at, kept.projected + at, m, tokens, width, kept.middle + at);
        modulate(kept.middle + at, m + 3 * width, m + 5 * width, tokens, width, kept.second + at,
                 kept.statistics + 2 * (rows + row));
    });
    linear(kept.second, weights[4], weights[5], rows, width, hidden, space, kept.hidden, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows * hidden; i += LANES) {
        const Vector h = load_vector(kept.hidden + i);
        store(h * logistic(h), kept.activated + i);
    }
    linear(kept.activated, weights[6], weights[7], rows, hidden, width, space, kept.contracted, threads);
    samples([&](const float *m, int64_t at, int64_t) {
        gated_add(kept.middle + at, kept.contracted + at, m + width, tokens, width, output + at);
    });
}

// gradients: of the weights, in their order
extern "C" void block_backward(const float *x, const float *modulation, const float *scale, const float *const *weights,
                               float *memory, float *space, const float *output_gradient, float *x_gradient,
                               float *modulation_gradient, float *scale_gradient, float *const *gradients, int64_t batch,
                               int64_t width, int64_t hidden, const int64_t *ends, int64_t scales, int64_t threads) {
    const int64_t tokens = ends[scales - 1], rows = batch * tokens, heads = width / CHANNELS;
    const Kept kept(memory, rows, width, hidden);
    Parts parts{space};
    float *narrow = parts.take(rows * width), *other = parts.take(rows * width), *wide = parts.take(rows * hidden);
    float *joint = parts.take(rows * 3 * width);
    const auto samples = [&](auto work) {
#pragma omp parallel for num_threads(threads)
        for (int64_t b = 0; b < batch; b++)
            work(modulation + b * 6 * width, modulation_gradient + b * 6 * width, b * tokens * width, b * tokens);
    };
    samples([&](const float *m, float *g, int64_t at, int64_t) {
        gated_add_backward(kept.contracted + at, m + width, output_gradient + at, tokens, width, narrow + at, g + width);
    });
    linear_backward(narrow, kept.activated, weights[6], rows, hidden, width, wide, gradients[6], gradients[7], threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows * hidden; i += LANES) {
        const Vector h = load_vector(kept.hidden + i), gate = logistic(h);
        const Vector slope = gate + h * gate * (1.0f - gate) * 1.5957691216057308f * (1.0f + 0.134145f * h * h);
        store(load_vector(wide + i) * slope, wide + i);
    }
    linear_backward(wide, kept.second, weights[4], rows, width, hidden, narrow, gradients[4], gradients[5], threads);
    samples([&](const float *m, float *g, int64_t at, int64_t row) {
        memcpy(x_gradient + at, output_gradient + at, sizeof(float) * tokens * width);
        modulate_backward(kept.middle + at, kept.statistics + 2 * (rows + row), m + 3 * width, narrow + at, tokens, width,
                          x_gradient + at, g + 3 * width, g + 5 * width);
        gated_add_backward(kept.projected + at, m, x_gradient + at, tokens, width, other + at, g);
    });
    linear_backward(other, kept.attended, weights[2], rows, width, width, narrow, gradients[2], gradients[3], threads);
    attention_backward(kept.joint, scale, kept.attended, kept.log_sum, narrow, joint, scale_gradient, batch, heads, ends,
                       scales, threads);
    linear_backward(joint, kept.first, weights[0], rows, width, 3 * width, narrow, gradients[0], gradients[1], threads);
    samples([&](const float *m, float *g, int64_t at, int64_t row) {
        modulate_backward(x + at, kept.statistics + 2 * row, m + 2 * width, narrow + at, tokens, width, x_gradient + at,
                          g + 2 * width, g + 4 * width);
    });
}
