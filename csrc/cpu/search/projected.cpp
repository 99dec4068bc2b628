#include "cpu/search/projected.h"

#include <algorithm>
#include <mutex>
#include <random>
#include <tuple>

#include "cpu/threads.h"

namespace mrl {
namespace {

std::vector<float> signs(int64_t dim, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<float> some(dim);
    for (float& sign : some) sign = random() & 1 ? 1.0f : -1.0f;
    return some;
}

void add(const Kernels& kernels, const Scan& scan, const float* vector, float* sums) {
    for (const Segment& segment : scan.segments) {
        kernels.advance(Source::PRODUCT, segment, vector, sums);
        vector += segment.cols;
    }
    for (int r = 0; r < TILE; ++r)
        if (!std::isfinite(sums[r])) sums[r] = 0.0f;
}

}  // namespace

std::vector<Projected> project(const Run& run, const Rows& rows, int64_t dim) {
    const std::vector<float> first = signs(dim, 1), second = signs(dim, 2);
    std::vector<Projected> all(rows.eligible());
    std::atomic<size_t> next{0};
    each_tile(run, rows, dim, [&](const Scan& scan, int64_t number) {
        float sums[TILE] = {}, others[TILE] = {};
        add(run.kernels, scan, first.data(), sums);
        add(run.kernels, scan, second.data(), others);
        size_t at = next.fetch_add(__builtin_popcountll(scan.wanted));
        for (uint64_t lanes = scan.wanted; lanes; lanes &= lanes - 1) {
            const int r = __builtin_ctzll(lanes);
            all[at++] = {sums[r], others[r], scan.first_row + r, number * TILE + r};
        }
    });
    std::sort(all.begin(), all.end(), [](const Projected& a, const Projected& b) {
        return std::tie(a.sum, a.other, a.row) < std::tie(b.sum, b.other, b.row);
    });
    return all;
}

}  // namespace mrl
