// Row-major vectors into what a search reads: vertical tiles, int8 codes, norms.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scan.h"

namespace mrl {
namespace {

// One chain of fp64 sums, so a norm depends on its row only. Rounded up, with room for its error.
float norm_above(const float* x, int64_t cols) {
    double sum = 0.0;
    for (int64_t c = 0; c < cols; ++c) sum += double(x[c]) * x[c];
    const float norm = float(std::sqrt(sum) * (1.0 + 1e-12 * (cols + 1)));
    return sum > 0.0 ? std::nextafter(norm, INFINITY) : 0.0f;
}

float widen(const void* row, DType dtype, int64_t c) {
    if (dtype == DType::F32) return static_cast<const float*>(row)[c];
    return widen_half(static_cast<const uint16_t*>(row)[c], dtype);
}

// codes: where lane 0 of the row's quads lies in its tile; error: norm of what they leave.
void encode(const float* x, int64_t dim, uint8_t* codes, float* unit, float* error) {
    float largest = 0.0f;
    for (int64_t c = 0; c < dim; ++c) largest = std::max(largest, std::abs(x[c]));
    if (largest < TINY) largest = 0.0f;  // the error says so
    *unit = largest / 127.0f;
    const float codes_a_unit = largest > 0.0f ? 127.0f / largest : 0.0f;
    double sum = 0.0;
    for (int64_t c = 0; c < (dim + 3) / 4 * 4; ++c) {
        const float value = c < dim ? x[c] : 0.0f;
        const float scaled = std::min(std::max(value * codes_a_unit, -127.0f), 127.0f);
        const int code = int(std::lrint(scaled));
        codes[c / 4 * TILE * 4 + c % 4] = uint8_t(code + 128);
        const double rest = value - double(*unit) * code;
        sum += rest * rest;
    }
    *error = std::nextafter(float(std::sqrt(sum) * (1.0 + 1e-12 * (dim + 1))), INFINITY);
}

}  // namespace

Status store(const Kernels& kernels, const Rows& rows, const void* data, DType dtype,
             int64_t stride, int64_t dim, int64_t begin, int64_t n, int threads, float* packed,
             uint8_t* codes, float* stats, int64_t stats_stride) {
    const int64_t quads = (rows.code_dim + 3) / 4, size = element_size(dtype);
    const int64_t first = begin / TILE, last = (begin + n + TILE - 1) / TILE;
    std::atomic<bool> finite{true};
    Ranges ranges(last - first, 16);
    auto row_at = [&](int64_t row) {
        return static_cast<const char*>(data) + (row - begin) * stride * size;
    };
    parallel(threads_for(double(n) * dim, threads), [&](int) {
        std::vector<float> vector(dim), lanes(rows.packed_dim * TILE);
        const void *pointers[TILE], *ahead[TILE];
        for (int64_t tile, end; ranges.next(&tile, &end);)
            for (tile += first, end += first; tile < end; ++tile) {
                const int64_t from = std::max(tile * TILE, begin);
                const int count = int(std::min((tile + 1) * TILE, begin + n) - from);
                const int lane = int(from - tile * TILE);
                for (int r = 0; r < TILE; ++r) {
                    pointers[r] = row_at(from + std::min(r, count - 1));
                    ahead[r] = row_at(std::min(from + TILE + r, begin + n - 1));
                }
                if (packed) {
                    // Lanes that were filled before stay as they are.
                    float* target = packed + tile * rows.packed_dim * TILE;
                    float* whole = lane == 0 ? target : lanes.data();
                    if (!kernels.pack(pointers, ahead, dtype, count, rows.packed_dim, whole))
                        finite = false;
                    if (lane > 0)
                        for (int64_t c = 0; c < rows.packed_dim; ++c)
                            std::copy_n(whole + c * TILE, count, target + c * TILE + lane);
                }
                if (!stats) continue;
                for (int64_t row = from; row < from + count; ++row) {
                    for (int64_t c = 0; c < dim; ++c) vector[c] = widen(row_at(row), dtype, c);
                    const int64_t prefix = std::max(rows.packed_dim, rows.code_dim);
                    stats[PREFIX_NORM * stats_stride + row] = norm_above(vector.data(), prefix);
                    for (size_t l = 0; l < rows.levels.size(); ++l)
                        stats[(TAIL_NORM + l) * stats_stride + row] =
                            norm_above(vector.data() + rows.levels[l], dim - rows.levels[l]);
                    if (codes)
                        encode(vector.data(), rows.code_dim,
                               codes + (tile * quads * TILE + row - tile * TILE) * 4,
                               stats + CODE_SCALE * stats_stride + row,
                               stats + CODE_ERROR * stats_stride + row);
                }
            }
    });
    return finite ? Status::OK : Status::NOT_FINITE;
}

}  // namespace mrl
