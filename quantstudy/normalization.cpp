// BatchNorm of a batch and the activation behind it, in one: y = clamp((x - mean) * scale + bias, low, high) with scale =
// weight / sqrt(variance + eps), and its gradients. What takes time is to read and write maps that no cache holds: x is
// read twice and y written, backward reads x and dy twice and writes dx; y is not kept. Maps are rows of channels.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr long kLanes = 8;
constexpr long kRows = 256;  // whose float32 sums are added to those of all rows, which are double

struct Normalization {
    const float* x;                         // [rows, channels], as `to`
    const float *weight, *bias;             // [channels], as all below
    float *mean, *inverse;                  // of the batch: 1 / sqrt(variance + eps)
    float *running_mean, *running_variance; // or null
    float* to;
    int64_t rows, channels;
    float low, high, eps, momentum;
};

struct Gradient {
    const float *x, *dy;  // [rows, channels], as `dx`
    const float *weight, *bias, *mean, *inverse;
    float *dx, *dweight, *dbias;
    int64_t rows, channels;
    float low, high;
};

// Calls f(first, last) for blocks of rows.
template <class F>
void for_blocks(long rows, long threads, const F& f) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row += kRows) f(row, std::min(rows, row + kRows));
}

// Calls add(row, sums) for each row and returns `sums`, [2, channels].
template <class F>
std::vector<double> sums_of(long rows, long channels, long threads, const F& add) {
    const long blocks = (rows + kRows - 1) / kRows;
    std::vector<std::vector<double>> of_threads(threads, std::vector<double>(2 * channels));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long thread = 0; thread < threads; ++thread) {
        std::vector<float> sums(2 * channels);
        const long last = std::min(rows, (thread + 1) * blocks / threads * kRows);
        for (long row = thread * blocks / threads * kRows; row < last;) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (const long end = std::min(last, row + kRows); row < end; ++row) add(row, sums.data());
            for (long i = 0; i < 2 * channels; ++i) of_threads[thread][i] += sums[i];
        }
    }
    for (long thread = 1; thread < threads; ++thread)
        for (long i = 0; i < 2 * channels; ++i) of_threads[0][i] += of_threads[thread][i];
    return of_threads[0];
}

void add_to(float* sum, __m256 values) { _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), values)); }

std::vector<float> scale_of(const float* weight, const float* inverse, long channels) {
    std::vector<float> scale(channels);
    for (long c = 0; c < channels; ++c) scale[c] = weight[c] * inverse[c];
    return scale;
}

}  // namespace

extern "C" void normalize(const Normalization* given, int64_t threads) {
    const Normalization& p = *given;
    // Sums of differences from the mean of some rows: with those from 0 a variance could be lost beside a large mean.
    std::vector<float> near(p.channels);
    const long some = std::min<long>(p.rows, kRows / 4);
    for (long row = 0; row < some; ++row)
        for (long c = 0; c < p.channels; ++c) near[c] += p.x[row * p.channels + c] * (1.0f / some);
    const auto sums = sums_of(p.rows, p.channels, threads, [&](long row, float* sums) {
        const float* x = p.x + row * p.channels;
        for (long c = 0; c < p.channels; c += kLanes) {
            const __m256 difference = _mm256_sub_ps(_mm256_loadu_ps(x + c), _mm256_loadu_ps(&near[c]));
            add_to(sums + c, difference);
            add_to(sums + p.channels + c, _mm256_mul_ps(difference, difference));
        }
    });
    const double rows = p.rows;
    for (long c = 0; c < p.channels; ++c) {
        const double difference = sums[c] / rows, square = sums[p.channels + c] / rows - difference * difference;
        const double mean = difference + near[c], variance = square < 0 ? 0 : square;  // NaN stays
        p.mean[c] = mean;
        p.inverse[c] = 1 / std::sqrt(variance + p.eps);
        if (!p.running_mean) continue;
        p.running_mean[c] += p.momentum * (mean - p.running_mean[c]);
        p.running_variance[c] += p.momentum * (variance * rows / (rows - 1) - p.running_variance[c]);
    }
    const auto scale = scale_of(p.weight, p.inverse, p.channels);
    const __m256 low = _mm256_set1_ps(p.low), high = _mm256_set1_ps(p.high);
    for_blocks(p.rows, threads, [&](long row, long last) {
        for (; row < last; ++row) {
            const float* x = p.x + row * p.channels;
            float* to = p.to + row * p.channels;
            for (long c = 0; c < p.channels; c += kLanes) {
                const __m256 centered = _mm256_sub_ps(_mm256_loadu_ps(x + c), _mm256_loadu_ps(p.mean + c));
                const __m256 y = _mm256_fmadd_ps(centered, _mm256_loadu_ps(&scale[c]), _mm256_loadu_ps(p.bias + c));
                _mm256_storeu_ps(to + c, _mm256_min_ps(high, _mm256_max_ps(low, y)));  // in this order NaN stays
            }
        }
    });
}

extern "C" void normalize_backward(const Gradient* given, int64_t threads) {
    const Gradient& p = *given;
    const auto scale = scale_of(p.weight, p.inverse, p.channels);
    const __m256 low = _mm256_set1_ps(p.low), high = _mm256_set1_ps(p.high);
    // The gradient by what was clamped, and x - mean.
    const auto unclamped = [&](long row, long c, __m256* centered) {
        const long at = row * p.channels + c;
        *centered = _mm256_sub_ps(_mm256_loadu_ps(p.x + at), _mm256_loadu_ps(p.mean + c));
        const __m256 y = _mm256_fmadd_ps(*centered, _mm256_loadu_ps(&scale[c]), _mm256_loadu_ps(p.bias + c));
        const __m256 inside = _mm256_and_ps(_mm256_cmp_ps(y, low, _CMP_NLE_UQ), _mm256_cmp_ps(y, high, _CMP_NGE_UQ));
        return _mm256_and_ps(inside, _mm256_loadu_ps(p.dy + at));
    };
    const auto sums = sums_of(p.rows, p.channels, threads, [&](long row, float* sums) {
        for (long c = 0; c < p.channels; c += kLanes) {
            __m256 centered;
            const __m256 dy = unclamped(row, c, &centered);
            add_to(sums + c, dy);
            add_to(sums + p.channels + c, _mm256_mul_ps(dy, centered));
        }
    });
    std::vector<float> shift(p.channels), slope(p.channels);  // dx = scale * dy + slope * (x - mean) + shift
    for (long c = 0; c < p.channels; ++c) {
        const double inverse = p.inverse[c];
        p.dbias[c] = sums[c];
        p.dweight[c] = sums[p.channels + c] * inverse;
        shift[c] = -scale[c] * sums[c] / p.rows;
        slope[c] = -scale[c] * inverse * inverse * sums[p.channels + c] / p.rows;
    }
    for_blocks(p.rows, threads, [&](long row, long last) {
        for (; row < last; ++row) {
            for (long c = 0; c < p.channels; c += kLanes) {
                __m256 centered;
                const __m256 dy = unclamped(row, c, &centered);
                const __m256 rest = _mm256_fmadd_ps(centered, _mm256_loadu_ps(&slope[c]), _mm256_loadu_ps(&shift[c]));
                _mm256_storeu_ps(p.dx + row * p.channels + c, _mm256_fmadd_ps(dy, _mm256_loadu_ps(&scale[c]), rest));
            }
        }
    });
}
