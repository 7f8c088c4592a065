// Int8 layers in products of 16-bit integers (vpmaddwd), for x86 CPUs without VNNI: exact, whatever the codes are, if the
// sums fit into 32 bits.
//
// A convolution with a 3x3 kernel is Winograd's F(MxM, 3x3), M = 2 or 3: each tile of (M + 2)^2 pixels and each kernel is
// transformed, and as many products of the two give MxM outputs, where the kernel itself takes 9 for each. In integers,
// with weights times 4 or 36, nothing is rounded: pixels become at most 4590, weights 10368. Sums may wrap around, and what
// is left when the 4 or 36 is divided out is right if 4 times the result fits into 32 bits.
//
// For layers whose weights alone are quantized there is a product of float32 rows too.
//
// Values are rows of 16-bit integers, weights lie in pairs of inputs for 16 outputs at a time: [O / 16, I / 2, 16, 2].
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kOutputs = 16;   // that are summed at once: two vectors
constexpr int kRows = 6;       // that share the weights read: 12 of the 16 registers hold sums
constexpr long kInputs = 4096;  // of a matrix product, whose rows then stay in a core's cache
constexpr long kRowsKept = 48;

// What becomes of the sums: values, in [low, high], or their codes.
struct Output {
    const float *scale, *bias;  // [O]
    void* to;                   // uint8 or float32
    float low, high, inverse;   // of the output's scale
    int32_t zero_point, writes_codes;
    int64_t outputs;
};

struct Convolution {
    const uint8_t* images;   // [N, H, W, C]
    const int16_t* weights;  // [O / 16, (M + 2)^2, C / 2, 16, 2]
    Output output;           // [N, H, W, O]
    int64_t n, h, w, c;
    int32_t zero_point;
};

struct Product {
    const uint8_t* rows;    // [N, I]
    const int8_t* weights;  // [O / 16, I / 2, 16, 2]
    Output output;          // [N, O]
    int64_t n, inputs;
};

struct FloatProduct {
    const float* rows;       // [N, I]
    const uint8_t* weights;  // int8 [O / 16, I, 16], or two 4-bit codes + 8 a byte, [O / 16, I, 8], first those of 0 to 7
    const float* scale;      // [O / 16, G, 16]: of I / G inputs each
    const float* bias;       // [O]
    float* to;               // [N, O]
    int64_t n, inputs, outputs, groups, bits;
};

inline __m256i sixteen(const int16_t* at) { return _mm256_loadu_si256((const __m256i*)at); }
inline __m256i sixteen(const int8_t* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)); }

// Add the products of R rows of values, `stride` apart, and weights to R rows of sums.
template <int R, class Weight>
void multiply(const int16_t* values, long stride, const Weight* weights, long pairs, int32_t* sums, long sums_stride) {
    __m256i acc[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            acc[r][half] = _mm256_load_si256((const __m256i*)(sums + r * sums_stride + 8 * half));
    for (long k = 0; k < pairs; k++) {
        const __m256i first = sixteen(weights + 32 * k), second = sixteen(weights + 32 * k + 16);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, values + r * stride + 2 * k, 4);
            const __m256i v = _mm256_set1_epi32(pair);
            acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(v, first));
            acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(v, second));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            _mm256_store_si256((__m256i*)(sums + r * sums_stride + 8 * half), acc[r][half]);
}

// The same of any number of rows.
template <class Weight>
void multiply_all(long rows, const int16_t* values, long stride, const Weight* weights, long pairs, int32_t* sums,
                  long sums_stride) {
    constexpr decltype(&multiply<1, Weight>) by_rows[] = {multiply<1, Weight>, multiply<2, Weight>, multiply<3, Weight>,
                                                          multiply<4, Weight>, multiply<5, Weight>, multiply<6, Weight>};
    const long groups = (rows + kRows - 1) / kRows;
    for (long g = 0; g < groups; g++) {
        const long from = g * rows / groups, count = (g + 1) * rows / groups - from;
        by_rows[count - 1](values + from * stride, stride, weights, pairs, sums + from * sums_stride, sums_stride);
    }
}

// Turns the sums of 16 outputs into what is written of them.
class Finish {
   public:
    Finish(const Output& output, long first)
        : output_(output), first_(first), count_(std::min<long>(kOutputs, output.outputs - first)) {
        alignas(32) float scale[kOutputs] = {}, bias[kOutputs] = {};
        std::memcpy(scale, output.scale + first, 4 * count_);
        std::memcpy(bias, output.bias + first, 4 * count_);
        for (int half = 0; half < 2; half++) {
            scale_[half] = _mm256_load_ps(scale + 8 * half);
            bias_[half] = _mm256_load_ps(bias + 8 * half);
        }
    }

    void write(__m256i first, __m256i second, long row) const {
        const __m256 a = value(first, 0), b = value(second, 1);
        const long at = row * output_.outputs + first_;
        alignas(32) float values[kOutputs];
        alignas(16) uint8_t codes[kOutputs];
        if (!output_.writes_codes) {
            _mm256_store_ps(values, a), _mm256_store_ps(values + 8, b);
            std::memcpy((float*)output_.to + at, values, 4 * count_);
        } else if (count_ == kOutputs) {
            _mm_storeu_si128((__m128i*)((uint8_t*)output_.to + at), to_codes(a, b));
        } else {
            _mm_store_si128((__m128i*)codes, to_codes(a, b));
            std::memcpy((uint8_t*)output_.to + at, codes, count_);
        }
    }

   private:
    __m256 value(__m256i sum, int half) const {  // NaN stays NaN: these return their second argument then
        const __m256 y = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale_[half]), bias_[half]);
        return _mm256_min_ps(_mm256_set1_ps(output_.high), _mm256_max_ps(_mm256_set1_ps(output_.low), y));
    }
    __m256i to_steps(__m256 y) const {
        const __m256i steps = _mm256_cvtps_epi32(_mm256_mul_ps(y, _mm256_set1_ps(output_.inverse)));
        return _mm256_add_epi32(steps, _mm256_set1_epi32(output_.zero_point));
    }
    __m128i to_codes(__m256 a, __m256 b) const {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(to_steps(a), to_steps(b)), 0xd8);
        return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }

    const Output& output_;
    const long first_, count_;
    __m256 scale_[2], bias_[2];
};

inline __m256i widen(const uint8_t* at, long count) {
    alignas(16) uint8_t rest[16] = {};
    if (count < 16) std::memcpy(rest, at, count);
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(count < 16 ? rest : at)));
}

// B^T d of Winograd's algorithm for the points 0, 1, -1, (2 if M = 3,) infinity.
template <int M>
void to_points(const __m256i* d, __m256i* t) {
    const auto minus = [&](int i, int j) { return _mm256_sub_epi16(d[i], d[j]); };
    const auto plus = [&](int i, int j) { return _mm256_add_epi16(d[i], d[j]); };
    if constexpr (M == 2) {
        t[0] = minus(0, 2), t[1] = plus(1, 2), t[2] = minus(2, 1), t[3] = minus(1, 3);
    } else {
        t[3] = minus(3, 1);
        t[0] = _mm256_add_epi16(_mm256_slli_epi16(minus(0, 2), 1), t[3]);
        t[1] = _mm256_sub_epi16(t[3], plus(1, 2));
        t[2] = _mm256_add_epi16(_mm256_slli_epi16(minus(1, 2), 1), minus(3, 2));
        t[4] = _mm256_sub_epi16(minus(4, 2), _mm256_slli_epi16(t[3], 1));
    }
}

// A^T m.
template <int M>
void from_points(const __m256i* m, __m256i* y) {
    const __m256i sum = _mm256_add_epi32(m[1], m[2]), difference = _mm256_sub_epi32(m[1], m[2]);
    if constexpr (M == 2) {
        y[0] = _mm256_add_epi32(m[0], sum), y[1] = _mm256_sub_epi32(difference, m[3]);
    } else {
        y[0] = _mm256_add_epi32(_mm256_add_epi32(m[0], sum), m[3]);
        y[1] = _mm256_add_epi32(difference, _mm256_slli_epi32(m[3], 1));
        y[2] = _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_slli_epi32(m[3], 2)), m[4]);
    }
}

// B^T d B of a tile's pixels d, to values[position * step + channel].
template <int M>
void transform(const uint8_t* const* pixels, long channels, int16_t* values, long step) {
    constexpr int side = M + 2;
    for (long c = 0; c < channels; c += 16) {
        __m256i d[side], column[side], t[side][side], row[side];
#pragma GCC unroll 8
        for (int x = 0; x < side; x++) {
#pragma GCC unroll 8
            for (int y = 0; y < side; y++) d[y] = widen(pixels[side * y + x] + c, channels - c);
            to_points<M>(d, column);
#pragma GCC unroll 8
            for (int y = 0; y < side; y++) t[y][x] = column[y];
        }
#pragma GCC unroll 8
        for (int y = 0; y < side; y++) {
            to_points<M>(t[y], row);
#pragma GCC unroll 8
            for (int x = 0; x < side; x++) _mm256_store_si256((__m256i*)(values + (side * y + x) * step + c), row[x]);
        }
    }
}

// A^T m A of 8 outputs: of sums m, [(M + 2)^2, 16], those of MxM pixels.
template <int M>
void transform_back(const int32_t* sums, __m256i* pixels) {
    constexpr int side = M + 2;
    __m256i m[side], column[M], t[M][side];
#pragma GCC unroll 8
    for (int x = 0; x < side; x++) {
#pragma GCC unroll 8
        for (int y = 0; y < side; y++) m[y] = _mm256_load_si256((const __m256i*)(sums + (side * y + x) * kOutputs));
        from_points<M>(m, column);
#pragma GCC unroll 8
        for (int y = 0; y < M; y++) t[y][x] = column[y];
    }
#pragma GCC unroll 8
    for (int y = 0; y < M; y++) {
        from_points<M>(t[y], pixels + M * y);
#pragma GCC unroll 8
        for (int x = 0; x < M; x++) {
            __m256i& sum = pixels[M * y + x];
            if constexpr (M == 3) sum = _mm256_mullo_epi32(sum, _mm256_set1_epi32(0x38E38E39));  // 1 / 9 modulo 2^32
            sum = _mm256_srai_epi32(sum, 2);
        }
    }
}

struct Tile {
    long image, y, x;  // of the first of its output pixels
};

template <int M>
void convolve(const Convolution& p, const std::vector<Tile>& tiles, int16_t* values, int32_t* sums,
              const uint8_t* outside) {
    constexpr int side = M + 2, positions = side * side;
    const long count = tiles.size(), pairs = (p.c + 1) / 2, stride = (p.c + 15) / 16 * 16, step = count * stride;
    for (long t = 0; t < count; t++) {
        const uint8_t* pixels[positions];
        for (int i = 0; i < positions; i++) {
            const long y = tiles[t].y - 1 + i / side, x = tiles[t].x - 1 + i % side;
            const bool inside = y >= 0 && y < p.h && x >= 0 && x < p.w;
            pixels[i] = inside ? p.images + ((tiles[t].image * p.h + y) * p.w + x) * p.c : outside;
        }
        transform<M>(pixels, p.c, values + t * stride, step);
    }
    for (long first = 0; first < p.output.outputs; first += kOutputs) {
        std::memset(sums, 0, count * positions * kOutputs * sizeof *sums);
        for (int i = 0; i < positions; i++)
            multiply_all(count, values + i * step, stride, p.weights + (first * positions + i * kOutputs) * 2 * pairs,
                         pairs, sums + i * kOutputs, positions * kOutputs);
        const Finish finish(p.output, first);
        for (long t = 0; t < count; t++) {
            const auto [image, y, x] = tiles[t];
            __m256i found[2][M * M];
            for (int half = 0; half < 2; half++)
                transform_back<M>(sums + t * positions * kOutputs + 8 * half, found[half]);
            for (int i = 0; i < M * M; i++)
                if (y + i / M < p.h && x + i % M < p.w)
                    finish.write(found[0][i], found[1][i], (image * p.h + y + i / M) * p.w + x + i % M);
        }
    }
}

// Add the products of R rows, `stride` apart, and the weights of 16 outputs to R rows of sums, a group at a time.
template <int R, int Bits>
void multiply_floats(const float* rows, long stride, const uint8_t* weights, const float* scale, long groups, long size,
                     float* sums) {
    const __m256i eight = _mm256_set1_epi32(8), mask = _mm256_set1_epi32(15);
    for (long g = 0; g < groups; g++) {
        __m256 acc[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
        for (long k = g * size; k < (g + 1) * size; k++) {
            __m256i first, second;
            if constexpr (Bits == 8) {
                first = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(weights + 16 * k)));
                second = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(weights + 16 * k + 8)));
            } else {
                const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(weights + 8 * k)));
                first = _mm256_sub_epi32(_mm256_and_si256(both, mask), eight);
                second = _mm256_sub_epi32(_mm256_srli_epi32(both, 4), eight);
            }
            const __m256 a = _mm256_cvtepi32_ps(first), b = _mm256_cvtepi32_ps(second);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m256 x = _mm256_broadcast_ss(rows + r * stride + k);
                acc[r][0] = _mm256_fmadd_ps(x, a, acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(x, b, acc[r][1]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int half = 0; half < 2; half++) {
                float* at = sums + r * kOutputs + 8 * half;
                const __m256 s = _mm256_loadu_ps(scale + g * kOutputs + 8 * half);
                _mm256_storeu_ps(at, _mm256_fmadd_ps(acc[r][half], s, _mm256_loadu_ps(at)));
            }
    }
}

template <int Bits>
void multiply_all_floats(const FloatProduct& p, long threads) {
    constexpr decltype(&multiply_floats<1, Bits>) by_rows[] = {multiply_floats<1, Bits>, multiply_floats<2, Bits>,
                                                               multiply_floats<3, Bits>, multiply_floats<4, Bits>,
                                                               multiply_floats<5, Bits>, multiply_floats<6, Bits>};
    const long blocks = (p.outputs + kOutputs - 1) / kOutputs, parts = std::min<long>(blocks, 8 * threads);
    const long size = p.inputs / p.groups, width = 2 * Bits, at_once = std::max<long>(1, kInputs / size);
    const long row_groups = (p.n + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long part = 0; part < parts; part++) {
        const long from = part * blocks / parts, to = (part + 1) * blocks / parts;
        std::vector<float> sums((to - from) * p.n * kOutputs);
        for (long g = 0; g < p.groups; g += at_once)
            for (long block = from; block < to; block++)
                for (long r = 0; r < row_groups; r++) {
                    const long row = r * p.n / row_groups, count = (r + 1) * p.n / row_groups - row;
                    by_rows[count - 1](p.rows + row * p.inputs + g * size, p.inputs,
                                       p.weights + (block * p.inputs + g * size) * width,
                                       p.scale + (block * p.groups + g) * kOutputs, std::min(at_once, p.groups - g), size,
                                       sums.data() + ((block - from) * p.n + row) * kOutputs);
                }
        for (long block = from; block < to; block++)
            for (long row = 0; row < p.n; row++)
                for (long o = block * kOutputs; o < std::min((block + 1) * kOutputs, (long)p.outputs); o++)
                    p.to[row * p.outputs + o] = sums[((block - from) * p.n + row) * kOutputs + o % kOutputs] + p.bias[o];
    }
}

template <class T>
struct Buffer {  // aligned to 64 bytes
    explicit Buffer(long count) : data((T*)_mm_malloc(std::max<long>(count, 1) * sizeof(T), 64)) {}
    ~Buffer() { _mm_free(data); }
    Buffer(const Buffer&) = delete;
    T* const data;
};

template <int M>
void convolve_all(const Convolution& p, long most_tiles, long threads) {
    constexpr int positions = (M + 2) * (M + 2);
    const long high = (p.h + M - 1) / M, wide = (p.w + M - 1) / M, tiles = p.n * high * wide;
    const long stride = (p.c + 15) / 16 * 16;
    long parts = ((tiles + most_tiles - 1) / most_tiles + threads - 1) / threads * threads;  // as many for each thread
    parts = std::min(parts, tiles);
    const long largest = parts ? (tiles + parts - 1) / parts : 0;
#pragma omp parallel num_threads(threads)
    {
        const Buffer<int16_t> values(positions * largest * stride);
        const Buffer<int32_t> sums(positions * largest * kOutputs);
        const std::vector<uint8_t> outside(stride, (uint8_t)p.zero_point);
        std::vector<Tile> own;
#pragma omp for schedule(dynamic)
        for (long part = 0; part < parts; part++) {
            own.clear();
            for (long tile = part * tiles / parts; tile < (part + 1) * tiles / parts; tile++)
                own.push_back({tile / (high * wide), tile / wide % high * M, tile % wide * M});
            convolve<M>(p, own, values.data, sums.data, outside.data());
        }
    }
}

}  // namespace

extern "C" void convolve_3x3(const Convolution* given, int64_t side, int64_t most_tiles, int64_t threads) {
    (side == 2 ? convolve_all<2> : convolve_all<3>)(*given, most_tiles, threads);
}

extern "C" void multiply_rows(const Product* given, int64_t threads) {
    const Product& p = *given;
    const long pairs = (p.inputs + 1) / 2, stride = 2 * pairs, blocks = (p.output.outputs + kOutputs - 1) / kOutputs;
    const long parts = std::min<long>(blocks, 4 * threads);
    const Buffer<int16_t> values(p.n * stride);
    for (long row = 0; row < p.n; row++) {
        for (long i = 0; i < p.inputs; i++) values.data[row * stride + i] = p.rows[row * p.inputs + i];
        if (p.inputs < stride) values.data[row * stride + p.inputs] = 0;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long part = 0; part < parts; part++) {
        const long from = part * blocks / parts, to = (part + 1) * blocks / parts;
        const long most = std::min(p.n, kRowsKept);
        const Buffer<int32_t> sums((to - from) * most * kOutputs);
        for (long row = 0; row < p.n; row += most) {
            const long count = std::min(most, p.n - row);
            std::memset(sums.data, 0, (to - from) * most * kOutputs * sizeof *sums.data);
            for (long pair = 0; pair < pairs; pair += kInputs / 2)
                for (long block = from; block < to; block++)
                    multiply_all(count, values.data + row * stride + 2 * pair, stride,
                                 p.weights + (block * pairs + pair) * 2 * kOutputs, std::min(kInputs / 2, pairs - pair),
                                 sums.data + (block - from) * most * kOutputs, kOutputs);
            for (long block = from; block < to; block++) {
                const Finish finish(p.output, block * kOutputs);
                for (long r = 0; r < count; r++) {
                    const auto* at = (const __m256i*)(sums.data + ((block - from) * most + r) * kOutputs);
                    finish.write(_mm256_load_si256(at), _mm256_load_si256(at + 1), row + r);
                }
            }
        }
    }
}

extern "C" void multiply_float_rows(const FloatProduct* given, int64_t threads) {
    (given->bits == 8 ? multiply_all_floats<8> : multiply_all_floats<4>)(*given, threads);
}
