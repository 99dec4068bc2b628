#include "cpu/training/blocks.h"

#include <cstring>
#include <new>

#include "cpu/memory.h"

namespace mrl {
namespace {

constexpr double MULTIPLIES_A_THREAD = 8e6;  // below this, waking a thread costs more

}  // namespace

Buffer::Buffer(int64_t size) {
    const size_t bytes = std::max<int64_t>(size, 1) * sizeof(float);
    const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    const size_t whole = (bytes + alignment - 1) / alignment * alignment;
    data.reset(static_cast<float*>(std::aligned_alloc(alignment, whole)));
    if (!data) throw std::bad_alloc();
    advise_huge_pages(data.get(), whole);
}

int threads_for(const Scores& s, int threads) {
    const double multiplies = double(s.rows) * s.cols * s.dims.back();
    return int(std::max(1.0, std::min(double(threads), multiplies / MULTIPLIES_A_THREAD)));
}

void pack_blocks(Matrix m, int64_t begin, int64_t end, int64_t cols, float* out, int64_t apart) {
    for (int64_t c = 0; c < cols; c += TILE, out += apart) {
        const int64_t width = std::min<int64_t>(TILE, cols - c);
        for (int64_t r = begin; r < end; ++r) {
            float* to = out + (r - begin) * TILE;
            std::memcpy(to, m.data + r * m.stride + c, width * sizeof(float));
            std::fill(to + width, to + TILE, 0.0f);
        }
    }
}

void pack_tile(const Kernels& kernels, const Scores& s, int64_t tile, float* out) {
    RowColumns rows[TILE];
    const int n = int(std::min<int64_t>(TILE, s.cols - tile * TILE));
    for (int r = 0; r < n; ++r) rows[r] = {s.w.data + (tile * TILE + r) * s.w.stride, nullptr};
    kernels.pack(rows, nullptr, DType::F32, n, s.dims.back(), out);
}

std::vector<Step> steps_of(const std::vector<int64_t>& dims) {
    std::vector<Step> steps;
    int64_t at = 0;
    for (size_t g = 0; g < dims.size(); ++g)
        while (at < dims[g]) {
            const int64_t end = std::min(dims[g], (at / TILE + 1) * TILE);
            steps.push_back({at, end, int(g)});
            at = end;
        }
    return steps;
}

Columns::Columns(const Scores& s, int64_t tiles)
    : apart(tiles * TILE), scale(apart * s.dims.size(), 0.0f), bias(apart, NEGATIVE_INFINITY) {
    for (size_t g = 0; g < s.dims.size(); ++g)
        for (int64_t c = 0; c < s.cols; ++c)
            scale[g * apart + c] = s.col_scale ? s.col_scale[g * s.cols_apart + c] : 1.0f;
    for (int64_t c = 0; c < s.cols; ++c) bias[c] = s.bias ? s.bias[c] : 0.0f;
}

ScoreBlock block_of(const Scores& s, const Columns& columns, const float* scores, int64_t row,
                    int rows, int64_t tile) {
    const int64_t col = tile * TILE;
    ScoreBlock b = {};
    b.scores = scores;
    b.prefixes = int(s.dims.size());
    b.rows = rows;
    b.cols = int(std::min<int64_t>(TILE, s.cols - col));
    b.row_scale = s.row_scale ? s.row_scale + row : nullptr;
    b.row_apart = s.rows;
    b.col_scale = columns.scale.data() + col;
    b.col_apart = columns.apart;
    b.bias = columns.bias.data() + col;
    b.target = s.target ? s.target + row : nullptr;
    b.first_col = s.first_col + col;
    b.period = s.period;
    b.exclude_own = s.exclude_own;
    b.own_boost = s.own_boost;
    b.other_boost = s.other_boost;
    b.soft = s.soft ? s.soft + row * s.soft_stride + col : nullptr;
    b.soft_stride = s.soft_stride;
    b.mask = s.mask ? s.mask + row * s.mask_stride + col : nullptr;
    b.mask_stride = s.mask_stride;
    b.sigmoid = s.sigmoid;
    return b;
}

void make_scores(const Kernels& kernels, const std::vector<Step>& steps, const float* x,
                 int64_t x_apart, int rows, const float* w, float* scores) {
    for (const Step& step : steps) {
        const bool first = step.begin == 0;
        const bool opens = !first && (&step)[-1].prefix != step.prefix;
        float* out = scores + step.prefix * ROWS * TILE;
        kernels.product({x + step.begin / TILE * x_apart + step.begin % TILE, TILE, 1, rows,
                         w + step.begin * TILE, step.end - step.begin,
                         first   ? nullptr
                         : opens ? out - ROWS * TILE
                                 : out,
                         out, 0, TILE});
    }
}

}  // namespace mrl
