// Row-major vectors into what a search reads: vertical tiles, int8 codes, norms.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/threads.h"
#include "cpu/search/scan.h"

namespace mrl {
namespace {

// A norm in fp32, rounded up, with room for the error of its sum over so many columns.
float above(double norm, int64_t cols) {
    return norm > 0.0 ? std::nextafter(float(norm * (1.0 + 1e-12 * (cols + 1))), INFINITY) : 0.0f;
}

// What a search knows of a row; `stats` are the row's, `apart` from one another.
void describe(const Kernels& kernels, const float* x, int64_t dim, int64_t prefix,
              const std::vector<int64_t>& levels, float* stats, int64_t apart) {
    stats[PREFIX_NORM * apart] = above(std::sqrt(kernels.dot64(x, x, prefix)), prefix);
    double square = 0.0;  // of the columns from a level on: each level's own, the last first
    for (size_t l = levels.size(), end = dim; l-- > 0; end = levels[l]) {
        square += kernels.dot64(x + levels[l], x + levels[l], end - levels[l]);
        stats[(TAIL_NORM + l) * apart] = above(std::sqrt(square), dim);
    }
}

}  // namespace

Status store(const Kernels& kernels, const Rows& rows, const void* data, DType dtype,
             int64_t stride, int64_t dim, int64_t begin, int64_t n, int threads, float* packed,
             uint8_t* codes, float* stats, int64_t stats_stride, void* tail, int64_t tail_stride) {
    const int64_t quads = (rows.code_dim + 3) / 4, size = element_size(dtype);
    const int64_t first = begin / TILE, last = (begin + n + TILE - 1) / TILE;
    std::atomic<bool> finite{true};
    Ranges ranges(last - first, 4);
    auto row_at = [&](int64_t row) {
        return static_cast<const char*>(data) + (row - begin) * stride * size;
    };
    parallel(threads_for(8.0 * n * dim, threads), [&](int) {
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
                // A tile's rows at a time, while they are in cache.
                const int64_t rest = (dim - rows.packed_dim) * size;
                for (int r = 0; tail && r < count; ++r)
                    std::memcpy(static_cast<char*>(tail) + (from + r) * tail_stride * size,
                                static_cast<const char*>(pointers[r]) + rows.packed_dim * size,
                                rest);
                if (!stats) continue;
                for (int64_t row = from; row < from + count; ++row) {
                    const float* x =
                        static_cast<const float*>(static_cast<const void*>(row_at(row)));
                    if (dtype != DType::F32) {
                        kernels.widen_row(row_at(row), dtype, dim, vector.data());
                        x = vector.data();
                    }
                    float* mine = stats + row;
                    describe(kernels, x, dim, std::max(rows.packed_dim, rows.code_dim), rows.levels,
                             mine, stats_stride);
                    if (!codes) continue;
                    const Codes coded = encode(x, rows.code_dim);
                    mine[CODE_SCALE * stats_stride] = coded.unit;
                    mine[CODE_ERROR * stats_stride] = above(coded.error, rows.code_dim);
                    uint8_t* quads_of_row = codes + (tile * quads * TILE + row - tile * TILE) * 4;
                    for (size_t c = 0; c < coded.codes.size(); ++c)
                        quads_of_row[c / 4 * TILE * 4 + c % 4] = uint8_t(coded.codes[c] + 128);
                }
            }
    });
    return finite ? Status::OK : Status::NOT_FINITE;
}

}  // namespace mrl
