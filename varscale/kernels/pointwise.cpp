// What stands between the matrix products of a transformer block, on a CPU, forward and backward, each in one pass over
// memory: modulated layer normalisation, bias and GELU, and the gated residual connection.
//
// Layouts, row-major: rows (batch, tokens, channels). scale, shift and gate have one row for each sample, `stride` floats
// apart. Gradients of what tokens share are summed here over the tokens and left to the caller to sum over the batch, so
// that the order of summation, and with it every bit, does not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr float EPSILON = 1e-6f;

// 1 / (1 + e^-x), to 2e-7; beyond 40 taken for that of 40, 4e-18 off
inline float logistic(float x) {
    x = -x;
    // not further out: GELU would multiply by denormal numbers, which processors do a hundred times slower
    x = x < -40.0f ? -40.0f : x;
    x = x > 40.0f ? 40.0f : x;
    float whole;
    const float series = exponential_series<float>(x, whole);
    return 1.0f / (1.0f + series * __builtin_bit_cast(float, ((int32_t)whole + 127) << 23));
}

// GELU with the tanh approximation is h * logistic(2 u), u = sqrt(2 / pi) * (h + 0.044715 h^3)
constexpr float TWICE_ROOT = 1.5957691216057308f;
constexpr float CUBIC = 0.044715f;

}  // namespace

extern "C" void modulate_forward(const float *x, const float *scale, const float *shift, int64_t stride, float *output,
                                 float *statistics, int64_t batch, int64_t tokens, int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            const float *row = x + t * channels, *factor = scale + b * stride, *offset = shift + b * stride;
            float *out = output + t * channels, mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t c = 0; c < channels; c++) mean += row[c];
            mean /= channels;
#pragma omp simd reduction(+ : variance)
            for (int64_t c = 0; c < channels; c++) variance += (row[c] - mean) * (row[c] - mean);
            const float inverse = 1.0f / std::sqrt(variance / channels + EPSILON);
#pragma omp simd
            for (int64_t c = 0; c < channels; c++)
                out[c] = (row[c] - mean) * inverse * (1.0f + factor[c]) + offset[c];
            statistics[2 * t] = mean;
            statistics[2 * t + 1] = inverse;
        }
}

extern "C" void modulate_backward(const float *x, const float *scale, int64_t stride, const float *statistics,
                                  const float *gradient, float *x_gradient, float *scale_gradient,
                                  float *shift_gradient, int64_t batch, int64_t tokens, int64_t channels,
                                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; b++) {
        const float *factor = scale + b * stride;
        float *factor_sum = scale_gradient + b * channels, *offset_sum = shift_gradient + b * channels;
        memset(factor_sum, 0, sizeof(float) * channels);
        memset(offset_sum, 0, sizeof(float) * channels);
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            const float *row = x + t * channels, *incoming = gradient + t * channels;
            const float mean = statistics[2 * t], inverse = statistics[2 * t + 1];
            float *out = x_gradient + t * channels, total = 0, along = 0;
#pragma omp simd reduction(+ : total, along)
            for (int64_t c = 0; c < channels; c++) {
                const float normalised = (row[c] - mean) * inverse, inner = incoming[c] * (1.0f + factor[c]);
                factor_sum[c] += incoming[c] * normalised;
                offset_sum[c] += incoming[c];
                total += inner;
                along += inner * normalised;
            }
            total /= channels;
            along /= channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++)
                out[c] = inverse * (incoming[c] * (1.0f + factor[c]) - total - (row[c] - mean) * inverse * along);
        }
    }
}

extern "C" void bias_gelu_forward(const float *x, const float *bias, float *output, int64_t batch, int64_t tokens,
                                  int64_t channels, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            const float *row = x + t * channels;
            float *out = output + t * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                const float h = row[c] + bias[c];
                out[c] = h * logistic(TWICE_ROOT * h * (1.0f + CUBIC * h * h));
            }
        }
}

extern "C" void bias_gelu_backward(const float *x, const float *bias, const float *gradient, float *x_gradient,
                                   float *bias_gradient, int64_t batch, int64_t tokens, int64_t channels,
                                   int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; b++) {
        float *sum = bias_gradient + b * channels;
        memset(sum, 0, sizeof(float) * channels);
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            const float *row = x + t * channels, *incoming = gradient + t * channels;
            float *out = x_gradient + t * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                const float h = row[c] + bias[c];
                const float gate = logistic(TWICE_ROOT * h * (1.0f + CUBIC * h * h));
                const float slope = gate + h * gate * (1.0f - gate) * TWICE_ROOT * (1.0f + 3.0f * CUBIC * h * h);
                out[c] = incoming[c] * slope;
                sum[c] += incoming[c] * slope;
            }
        }
    }
}

extern "C" void gated_add_forward(const float *x, const float *branch, const float *bias, const float *gate,
                                  int64_t stride, float *output, int64_t batch, int64_t tokens, int64_t channels,
                                  int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; b++)
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            const float *row = x + t * channels, *added = branch + t * channels, *factor = gate + b * stride;
            float *out = output + t * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) out[c] = row[c] + factor[c] * (added[c] + bias[c]);
        }
}

extern "C" void gated_add_backward(const float *branch, const float *bias, const float *gate, int64_t stride,
                                   const float *gradient, float *branch_gradient, float *bias_gradient,
                                   float *gate_gradient, int64_t batch, int64_t tokens, int64_t channels,
                                   int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < batch; b++) {
        const float *factor = gate + b * stride;
        float *bias_sum = bias_gradient + b * channels, *gate_sum = gate_gradient + b * channels;
        memset(bias_sum, 0, sizeof(float) * channels);
        memset(gate_sum, 0, sizeof(float) * channels);
        for (int64_t t = b * tokens; t < (b + 1) * tokens; t++) {
            const float *added = branch + t * channels, *incoming = gradient + t * channels;
            float *out = branch_gradient + t * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                out[c] = incoming[c] * factor[c];
                bias_sum[c] += incoming[c] * factor[c];
                gate_sum[c] += incoming[c] * (added[c] + bias[c]);
            }
        }
    }
}
