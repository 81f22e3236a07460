// All blocks of a transformer on a CPU, forward and backward: narrow ones spend their time around the arithmetic otherwise.
//
// Layouts, row-major: x, outputs (blocks, batch, tokens, WIDTH); modulation (blocks, batch, 6, WIDTH): gates, scales and
// shifts, of attention and of the feed-forward layers each. Weights as PyTorch keeps them, (outputs, inputs). WIDTH and HIDDEN
// are whole vectors.
// Every sum is taken in one order whatever the number of threads.

#include <omp.h>

#include "attention.cpp"

namespace {

constexpr float EPSILON = 1e-6f;
constexpr int ROWS = LANES == 16 ? 8 : 4;  // with three vectors of columns, the sums fill the registers
constexpr int COLUMNS = 3;
constexpr int64_t DEPTH = 64;  // rows that are summed up at a time: they stay in the first-level cache

// result = a · b + first, where a(i, k) lies at a[i * row_step + k * step] and b (depth, columns) is row-major; the rows of
// `first` lie first_step apart: 0 for a bias, and none of it is zeros
template <int R, int V>
inline void tile(const float *a, int64_t row_step, int64_t step, const float *b, int64_t depth, int64_t columns,
                 const float *first, int64_t first_step, float *result) {
    Vector sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sum[r][v] = first ? load_vector(first + r * first_step + v * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++, a += step, b += columns) {
        Vector loaded[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            loaded[v] = load_vector(b + v * LANES);
#ifdef __x86_64__
            asm("" : "+x"(loaded[v]));  // in a register: GCC would load it anew for each row
#endif
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const Vector factor = all(a[r * row_step]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sum[r][v] += loaded[v] * factor;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
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

// Gradients of x (rows, inputs) · weight (outputs, inputs)ᵀ + bias: of its input, its weight and its bias.
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

// What the forward pass keeps; the same memory in the same order in both directions. What a pass over it gives again, the
// normalised streams and the activation, is cheaper to compute anew than to write and to read.
struct Kept {
    float *joint, *attended, *projected, *middle, *hidden, *contracted, *log_sum;
    Kept(float *memory, int64_t rows, int64_t width, int64_t hidden_width) {
        Parts parts{memory};
        joint = parts.take(rows * 3 * width);
        attended = parts.take(rows * width);
        projected = parts.take(rows * width);
        middle = parts.take(rows * width);
        hidden = parts.take(rows * hidden_width);
        contracted = parts.take(rows * width);
        log_sum = parts.take(rows * (width / CHANNELS));
    }
};

// What a block has, in the order in which it is handed over; of gradients, too.
struct Weights {
    float *joint, *query_bias, *value_bias, *log_scale, *projection, *projection_bias, *expand, *expand_bias, *contract,
        *contract_bias;
};

// A block's matrices as `product` reads them, the bias of queries, keys (none) and values, and the factors on logits.
struct Prepared {
    float *joint, *projection, *expand, *contract, *bias, *scale;
    Prepared(float *memory, int64_t width, int64_t hidden) {
        Parts parts{memory};
        joint = parts.take(3 * width * width);
        projection = parts.take(width * width);
        expand = parts.take(hidden * width);
        contract = parts.take(hidden * width);
        bias = parts.take(3 * width);
        scale = parts.take(width);
    }
    static int64_t floats(int64_t width, int64_t hidden) { return width * (4 * width + 2 * hidden + 4); }
};

struct Shape {
    int64_t batch, width, hidden;
    const int64_t *ends;
    int64_t scales, threads;
    float log_limit;
    int64_t tokens() const { return ends[scales - 1]; }
    int64_t rows() const { return batch * tokens(); }
    int64_t heads() const { return width / CHANNELS; }
    int64_t kept() const { return rows() * (7 * width + hidden + heads()); }
    // calls work(sample, offset of its x, offset of its rows) for each sample
    template <typename Work>
    void samples(Work work) const {
#pragma omp parallel for num_threads(threads)
        for (int64_t b = 0; b < batch; b++) work(b, b * tokens() * width, b * tokens());
    }
    void factors(const float *log_scale, float *scale) const {
        for (int64_t h = 0; h < heads(); h++) scale[h] = std::exp(log_scale[h] < log_limit ? log_scale[h] : log_limit);
    }
};

void transpose(const float *weight, int64_t outputs, int64_t inputs, float *transposed) {
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t i = 0; i < inputs; i++) transposed[i * outputs + o] = weight[o * inputs + i];
}

Prepared prepare(const Shape &shape, const Weights &weights, float *memory) {
    const int64_t width = shape.width, hidden = shape.hidden;
    const Prepared prepared(memory, width, hidden);
    transpose(weights.joint, 3 * width, width, prepared.joint);
    transpose(weights.projection, width, width, prepared.projection);
    transpose(weights.expand, hidden, width, prepared.expand);
    transpose(weights.contract, width, hidden, prepared.contract);
    memcpy(prepared.bias, weights.query_bias, sizeof(float) * width);
    memset(prepared.bias + width, 0, sizeof(float) * width);
    memcpy(prepared.bias + 2 * width, weights.value_bias, sizeof(float) * width);
    shape.factors(weights.log_scale, prepared.scale);
    return prepared;
}

// Queries, keys and values of the tokens sampled so far: (batch, capacity, 3 · WIDTH), `begin` tokens of each filled.
struct Cache {
    float *rows;
    int64_t begin, capacity;
};

// output may be x itself; with a cache, the tokens are those that follow in it, and see all of it
void forward(const Shape &shape, const float *x, const float *modulation, const Weights &weights, const Prepared &prepared,
             const Cache *cache, float *memory, float *space, float *output) {
    const int64_t width = shape.width, hidden = shape.hidden, tokens = shape.tokens(), rows = shape.rows();
    const int64_t threads = shape.threads;
    const Kept kept(memory, rows, width, hidden);
    Parts parts{space};
    float *normal = parts.take(rows * width), *activated = parts.take(rows * hidden), *statistics = parts.take(2 * rows);
    shape.samples([&](int64_t b, int64_t at, int64_t row) {
        const float *m = modulation + b * 6 * width;
        modulate(x + at, m + 2 * width, m + 4 * width, tokens, width, normal + at, statistics + 2 * row);
    });
    product(normal, width, 1, prepared.joint, rows, width, 3 * width, prepared.bias, kept.joint, threads);
    if (cache) {
        const int64_t end = cache->begin + tokens;
        shape.samples([&](int64_t b, int64_t at, int64_t) {
            float *place = cache->rows + (b * cache->capacity + cache->begin) * 3 * width;
            memcpy(place, kept.joint + 3 * at, sizeof(float) * tokens * 3 * width);
        });
        attention_forward(cache->rows, prepared.scale, kept.attended, kept.log_sum, shape.batch, shape.heads(), &end, 1,
                          threads, cache->begin, cache->capacity);
    } else {
        attention_forward(kept.joint, prepared.scale, kept.attended, kept.log_sum, shape.batch, shape.heads(), shape.ends,
                          shape.scales, threads, 0, tokens);
    }
    product(kept.attended, width, 1, prepared.projection, rows, width, width, weights.projection_bias, kept.projected, threads);
    shape.samples([&](int64_t b, int64_t at, int64_t row) {
        const float *m = modulation + b * 6 * width;
        gated_add(x + at, kept.projected + at, m, tokens, width, kept.middle + at);
        modulate(kept.middle + at, m + 3 * width, m + 5 * width, tokens, width, normal + at, statistics + 2 * row);
    });
    product(normal, width, 1, prepared.expand, rows, width, hidden, weights.expand_bias, kept.hidden, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows * hidden; i += LANES) {
        const Vector h = load_vector(kept.hidden + i);
        store(h * logistic(h), activated + i);
    }
    product(activated, hidden, 1, prepared.contract, rows, hidden, width, weights.contract_bias, kept.contracted, threads);
    shape.samples([&](int64_t b, int64_t at, int64_t) {
        gated_add(kept.middle + at, kept.contracted + at, modulation + b * 6 * width + width, tokens, width, output + at);
    });
}

// gradient: of the output; becomes that of x
void backward(const Shape &shape, const float *x, const float *modulation, const Weights &weights, float *memory, float *space,
              float *gradient, float *modulation_gradient, const Weights &gradients) {
    const int64_t width = shape.width, hidden = shape.hidden, tokens = shape.tokens(), rows = shape.rows();
    const int64_t threads = shape.threads, heads = shape.heads();
    const Kept kept(memory, rows, width, hidden);
    Parts parts{space};
    float *narrow = parts.take(rows * width), *other = parts.take(rows * width), *wide = parts.take(rows * hidden);
    float *joint = parts.take(rows * 3 * width), *bias = parts.take(3 * width);
    float *normal = parts.take(rows * width), *activated = parts.take(rows * hidden), *statistics = parts.take(2 * rows);
    float *slope = parts.take(rows * hidden), *scale = parts.take(heads), *scale_gradient = parts.take(shape.batch * heads);
    shape.samples([&](int64_t b, int64_t at, int64_t) {
        gated_add_backward(kept.contracted + at, modulation + b * 6 * width + width, gradient + at, tokens, width, narrow + at,
                           modulation_gradient + b * 6 * width + width);
    });
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows * hidden; i += LANES) {
        const Vector h = load_vector(kept.hidden + i), gate = logistic(h);
        store(h * gate, activated + i);
        store(gate + h * gate * (1.0f - gate) * 1.5957691216057308f * (1.0f + 0.134145f * h * h), slope + i);
    }
    linear_backward(narrow, activated, weights.contract, rows, hidden, width, wide, gradients.contract,
                    gradients.contract_bias, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows * hidden; i += LANES)
        store(load_vector(wide + i) * load_vector(slope + i), wide + i);
    shape.samples([&](int64_t b, int64_t at, int64_t row) {
        const float *m = modulation + b * 6 * width;
        modulate(kept.middle + at, m + 3 * width, m + 5 * width, tokens, width, normal + at, statistics + 2 * row);
    });
    linear_backward(wide, normal, weights.expand, rows, width, hidden, narrow, gradients.expand, gradients.expand_bias,
                    threads);
    shape.samples([&](int64_t b, int64_t at, int64_t row) {
        const float *m = modulation + b * 6 * width;
        float *g = modulation_gradient + b * 6 * width;
        modulate_backward(kept.middle + at, statistics + 2 * row, m + 3 * width, narrow + at, tokens, width,
                          gradient + at, g + 3 * width, g + 5 * width);
        gated_add_backward(kept.projected + at, m, gradient + at, tokens, width, other + at, g);
    });
    linear_backward(other, kept.attended, weights.projection, rows, width, width, narrow, gradients.projection,
                    gradients.projection_bias, threads);
    shape.factors(weights.log_scale, scale);
    attention_backward(kept.joint, scale, kept.attended, kept.log_sum, narrow, joint, scale_gradient, shape.batch, heads,
                       shape.ends, shape.scales, threads);
    for (int64_t h = 0; h < heads; h++) {
        float sum = 0;
        for (int64_t b = 0; b < shape.batch; b++) sum += scale_gradient[b * heads + h];
        gradients.log_scale[h] = weights.log_scale[h] <= shape.log_limit ? sum * scale[h] : 0.0f;
    }
    shape.samples([&](int64_t b, int64_t at, int64_t row) {
        const float *m = modulation + b * 6 * width;
        modulate(x + at, m + 2 * width, m + 4 * width, tokens, width, normal + at, statistics + 2 * row);
    });
    linear_backward(joint, normal, weights.joint, rows, width, 3 * width, narrow, gradients.joint, bias, threads);
    memcpy(gradients.query_bias, bias, sizeof(float) * width);
    memcpy(gradients.value_bias, bias + 2 * width, sizeof(float) * width);
    shape.samples([&](int64_t b, int64_t at, int64_t row) {
        float *g = modulation_gradient + b * 6 * width;
        modulate_backward(x + at, statistics + 2 * row, modulation + b * 6 * width + 2 * width, narrow + at, tokens, width,
                          gradient + at, g + 2 * width, g + 4 * width);
    });
}

}  // namespace

// memory: what `backward` needs; outputs: of all blocks, one after the other
extern "C" void blocks_forward(const float *x, const float *modulation, const Weights *weights, float *memory, float *space,
                               float *outputs, int64_t blocks, int64_t batch, int64_t width, int64_t hidden,
                               const int64_t *ends, int64_t scales, int64_t threads, float log_limit) {
    const Shape shape{batch, width, hidden, ends, scales, threads, log_limit};
    for (int64_t i = 0; i < blocks; i++) {
        float *output = outputs + i * shape.rows() * width;
        const Prepared prepared = prepare(shape, weights[i], space);
        forward(shape, x, modulation + i * batch * 6 * width, weights[i], prepared, nullptr, memory + i * shape.kept(),
                space + Prepared::floats(width, hidden), output);
        x = output;
    }
}

// Without a backward pass: each thread takes `at_once` samples through all blocks, so that they stay in its cache.
// output: of the last block; caches: of each block, for `capacity` tokens of which `begin` are filled, or null;
// prepared, space: room for all blocks, and for each thread's samples
extern "C" void blocks_without_gradients(const float *x, const float *modulation, const Weights *weights, float *const *caches,
                                         int64_t begin, int64_t capacity, int64_t at_once, float *prepared, float *space,
                                         float *output, int64_t blocks, int64_t batch, int64_t width, int64_t hidden,
                                         const int64_t *ends, int64_t scales, int64_t threads, float log_limit) {
    const Shape all{batch, width, hidden, ends, scales, 1, log_limit}, most{at_once, width, hidden, ends, scales, 1, log_limit};
    const int64_t tokens = all.tokens(), matrices = Prepared::floats(width, hidden);
    const int64_t part_space = most.kept() + most.rows() * (width + hidden + 2);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < blocks; i++) prepare(all, weights[i], prepared + i * matrices);
        float *memory = space + omp_get_thread_num() * part_space;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < batch; first += at_once) {
            const Shape part{batch - first < at_once ? batch - first : at_once, width, hidden, ends, scales, 1, log_limit};
            const float *input = x + first * tokens * width;
            float *result = output + first * tokens * width;
            for (int64_t i = 0; i < blocks; i++, input = result) {
                const Cache cache{caches ? caches[i] + first * capacity * 3 * width : nullptr, begin, capacity};
                forward(part, input, modulation + (i * batch + first) * 6 * width, weights[i],
                        Prepared(prepared + i * matrices, width, hidden), caches ? &cache : nullptr, memory,
                        memory + most.kept(), result);
            }
        }
    }
}

// gradient: of the last output; becomes that of x
extern "C" void blocks_backward(const float *x, const float *modulation, const Weights *weights, float *memory, float *space,
                                const float *outputs, float *gradient, float *modulation_gradient, const Weights *gradients,
                                int64_t blocks, int64_t batch, int64_t width, int64_t hidden, const int64_t *ends,
                                int64_t scales, int64_t threads, float log_limit) {
    const Shape shape{batch, width, hidden, ends, scales, threads, log_limit};
    for (int64_t i = blocks - 1; i >= 0; i--) {
        const float *input = i ? outputs + (i - 1) * shape.rows() * width : x;
        backward(shape, input, modulation + i * batch * 6 * width, weights[i], memory + i * shape.kept(), space, gradient,
                 modulation_gradient + i * batch * 6 * width, gradients[i]);
    }
}
