// Stores row-major vectors as a search reads them: vertical tiles, codes, norms.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/search/bounds.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

// A norm rounded up to fp32, with room for the error of its sum over so many columns.
float above(double norm, int64_t cols) {
    return norm > 0.0 ? std::nextafter(float(norm * (1.0 + 1e-12 * (cols + 1))), INFINITY) : 0.0f;
}

// Fills a span tile by tile, while a tile's rows are in cache.
class Writer {
  public:
    Writer(const Kernels& kernels, const Rows& layout, const NewRows& vectors, int64_t begin,
           const SpanArrays& to)
        : kernels_(kernels),
          layout_(layout),
          vectors_(vectors),
          begin_(begin),
          end_(begin + vectors.n),
          size_(element_size(vectors.dtype)),
          header_(row_header(vectors.dtype)),
          to_(to),
          coder_(kernels, layout.ladder),
          widened_(vectors.dim),
          lanes_(layout.packed_dim * TILE) {}

    // False if a value to be packed is not finite.
    bool write(int64_t tile) {
        const int64_t first = std::max(tile * TILE, begin_);
        const int count = int(std::min((tile + 1) * TILE, end_) - first);
        bool finite = !to_.packed || pack(tile, first, count);
        for (int64_t row = first; row < first + count; ++row) {
            if (to_.suffix) layout_.dtype == vectors_.dtype ? copy_suffix(row) : code_suffix(row);
            if (to_.stats && !describe(row)) finite = false;
        }
        if (to_.signs) coder_.put(tile, int(first % TILE), count, to_);
        return finite;
    }

  private:
    const char* at(int64_t row) const {
        return static_cast<const char*>(vectors_.data) + (row - begin_) * vectors_.stride * size_;
    }

    RowColumns columns(int64_t row) const { return {at(row) + header_, at(row)}; }

    bool pack(int64_t tile, int64_t first, int count) {
        RowColumns pointers[TILE], ahead[TILE];
        for (int r = 0; r < TILE; ++r) {
            pointers[r] = columns(first + std::min(r, count - 1));
            ahead[r] = columns(std::min(first + TILE + r, end_ - 1));
        }
        const int64_t cols = layout_.packed_dim;
        const int lane = int(first - tile * TILE);
        float* target = to_.packed + tile * cols * TILE;
        float* whole = lane == 0 ? target : lanes_.data();
        const bool finite = kernels_.pack(pointers, ahead, vectors_.dtype, count, cols, whole);
        // Lanes that were filled before stay as they are.
        for (int64_t c = 0; lane > 0 && c < cols; ++c)
            std::copy_n(whole + c * TILE, count, target + c * TILE + lane);
        return finite;
    }

    void copy_suffix(int64_t row) const {
        char* target = static_cast<char*>(to_.suffix) + row * to_.suffix_stride * size_;
        std::memcpy(target, at(row), header_);
        std::memcpy(target + header_, at(row) + header_ + layout_.packed_dim * size_,
                    (vectors_.dim - layout_.packed_dim) * size_);
    }

    // Codes a row of F32, of which nothing is packed.
    char* coded(int64_t row) const {
        return static_cast<char*>(to_.suffix) + row * to_.suffix_stride;
    }
    void code_suffix(int64_t row) const {
        const float* x = static_cast<const float*>(static_cast<const void*>(at(row)));
        int8_t* codes = static_cast<int8_t*>(static_cast<void*>(coded(row) + SCALE_BYTES));
        const float scale = quantize(x, vectors_.dim, LEAST_CODED, codes);
        std::memcpy(coded(row), &scale, SCALE_BYTES);
    }

    // Writes a row's statistics and codes, but for those that a ladder puts into tiles; false if a
    // value that a ladder codes is not finite.
    bool describe(int64_t row) {
        const float* x = static_cast<const float*>(static_cast<const void*>(at(row)));
        if (layout_.dtype != DType::F32) {  // what is kept of it
            const bool copied = layout_.dtype == vectors_.dtype;
            const RowColumns kept =
                copied ? columns(row) : RowColumns{coded(row) + SCALE_BYTES, coded(row)};
            kernels_.widen_row(kept, layout_.dtype, vectors_.dim, widened_.data());
            x = widened_.data();
        }
        const auto stat = [&](int64_t which) -> float& {
            return to_.stats[which * to_.stats_stride + row];
        };
        if (to_.signs) return describe_ladder(row, x);
        const int64_t prefix = std::max(layout_.packed_dim, layout_.code_dim);
        stat(PREFIX_NORM) = above(std::sqrt(kernels_.dot64(x, x, prefix)), prefix);
        const std::vector<int64_t>& levels = layout_.levels;
        double square = 0.0;  // Σ x² from a level on, the last level first
        for (size_t l = levels.size(), end = vectors_.dim; l-- > 0; end = levels[l]) {
            square += kernels_.dot64(x + levels[l], x + levels[l], end - levels[l]);
            stat(TAIL_NORM + l) = above(std::sqrt(square), vectors_.dim);
        }
        if (!to_.codes) return true;
        const Codes codes = encode(x, layout_.code_dim);
        stat(CODE_SCALE) = codes.scale;
        stat(CODE_ERROR) = above(codes.error, layout_.code_dim);
        put_codes(codes, row, to_.codes);
        return true;
    }

    bool describe_ladder(int64_t row, const float* x) {
        const LadderStats& stats =
            coder_.code(x, int(row % TILE), to_.lows + row * low_bytes(vectors_.dim));
        const auto stat = [&](int64_t which) -> float& {
            return to_.stats[which * to_.stats_stride + row];
        };
        const int64_t width = vectors_.dim, dims = layout_.ladder.dims.size();
        const bool divided = terms_of(layout_.ladder.metric).normalized;
        const double unit = !divided ? 1.0 : stats.norm > 0.0 ? 1.0 / stats.norm : 0.0;
        stat(PREFIX_NORM) = above(stats.norm, width);
        stat(CODE_SCALE) = float(stats.scale * unit);
        // NaN, which drops nothing, where bounds in fp32 do not hold.
        const bool bounded = ordinary(stats.norm * stats.norm);
        stat(CODE_ERROR) = bounded ? above(stats.error * unit, width) : NAN;
        stat(LOW_ERROR) = above(stats.low_error * unit, width);
        for (int64_t i = 0; i < dims; ++i) {
            stat(SIGN_FACTOR + i) = stats.factors[i];
            stat(SIGN_FACTOR + dims + i) = stats.terms[i];
            if (divided) stat(SIGN_FACTOR + 2 * dims + i) = stats.inverses[i];
        }
        float* tile = to_.tile_stats + row / TILE * TILE_STATS;
        if (row % TILE == 0) tile[CODE_NORM] = tile[ROUNDED_NORM] = 0.0f;
        if (bounded) {
            const double code_norm = stats.size + stats.error;
            tile[CODE_NORM] = std::max(tile[CODE_NORM], above(code_norm * unit, width));
            tile[ROUNDED_NORM] =
                std::max(tile[ROUNDED_NORM], above((stats.norm + code_norm) * unit, width));
        }
        return std::isfinite(stats.norm);
    }

    const Kernels& kernels_;
    const Rows& layout_;
    const NewRows& vectors_;
    const int64_t begin_, end_, size_, header_;
    const SpanArrays& to_;
    LadderCoder coder_;
    std::vector<float> widened_, lanes_;
};

}  // namespace

Status store(const Run& run, const Rows& layout, const NewRows& vectors, int64_t begin,
             const SpanArrays& to) {
    const int64_t first = begin / TILE, last = (begin + vectors.n + TILE - 1) / TILE;
    std::atomic<bool> finite{true};
    Ranges ranges(last - first, 4);
    parallel(threads_for(8.0 * vectors.n * vectors.dim, run.threads), [&](int) {
        Writer writer(run.kernels, layout, vectors, begin, to);
        for (int64_t tile, end; ranges.next(&tile, &end);)
            for (; tile < end; ++tile)
                if (!writer.write(first + tile)) finite = false;
    });
    return finite ? Status::OK : Status::NOT_FINITE;
}

}  // namespace mrl
