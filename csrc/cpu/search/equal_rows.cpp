#include "cpu/search/equal_rows.h"

#include <algorithm>

namespace mrl {
namespace {

// Whether most rows with the same sums are equal, by a sample of such pairs.
bool mostly_equal(const Problem& p, const std::vector<Projected>& sorted) {
    constexpr size_t SAMPLED = 64;
    const size_t step = sorted.size() / SAMPLED + 1;
    std::vector<float> one, other;
    int equal = 0, pairs = 0;
    for (size_t i = 1; i < sorted.size(); i += step) {
        if (!sorted[i].same_sums(sorted[i - 1])) continue;
        p.columns(sorted[i - 1].row, &one);
        p.columns(sorted[i].row, &other);
        equal += std::equal(one.begin(), one.begin() + p.dim, other.begin());
        ++pairs;
    }
    return 2 * equal > pairs;
}

}  // namespace

EqualRows::EqualRows(const Problem& p, const std::vector<Projected>& sorted, int threads)
    : mask_(words_of(p.rows)) {
    std::vector<int64_t> starts;  // where each group of rows with the same sums begins
    for (size_t i = 0; i < sorted.size(); ++i)
        if (i == 0 || !sorted[i].same_sums(sorted[i - 1])) starts.push_back(i);
    const int64_t groups = starts.size();
    distinct_ = p.rows.eligible();
    if (groups * FEW > distinct_ || !mostly_equal(p, sorted)) return;
    starts.push_back(sorted.size());
    struct Place {
        int64_t group, member;
    };
    std::vector<Place> places(mask_.size() * TILE);
    std::vector<float> firsts(groups * p.dim), row;
    members_.resize(sorted.size());
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = sorted[starts[group]].row;
        p.columns(first, &row);
        std::copy(row.begin(), row.begin() + p.dim, firsts.begin() + group * p.dim);
        for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
            places[sorted[i].bit] = {group, i};
            members_[i] = {first, sorted[i].row};
        }
    }
    std::atomic<int64_t> others{0};
    each_tile({p.kernels, threads}, p.rows, p.dim, [&](const Scan& scan, int64_t number) {
        const Place* mine = places.data() + number * TILE;
        bool differs[TILE] = {};
        int64_t before = 0;  // columns
        for (const Segment& segment : scan.segments) {
            for (int r = 0; r < TILE; ++r) {
                const float* first = firsts.data() + mine[r].group * p.dim + before;
                for (int64_t c = 0; c < segment.cols; ++c)
                    differs[r] |= segment.tile[c * TILE + r] != first[c];
            }
            before += segment.cols;
        }
        for (uint64_t lanes = scan.wanted; lanes; lanes &= lanes - 1) {
            const int r = __builtin_ctzll(lanes);
            // A row whose sums equal another vector's stands for itself.
            auto& [first, row] = members_[mine[r].member];
            if (differs[r]) first = row;
            if (first == row) mask_[number] |= uint64_t(1) << r;
            others += first != row;
        }
    });
    distinct_ -= others;
    std::sort(members_.begin(), members_.end());
}

std::vector<Final> EqualRows::expand(const std::vector<Final>& firsts, int64_t k) const {
    std::vector<Final> all;
    for (auto at = firsts.begin(); at != firsts.end() && int64_t(all.size()) < k;) {
        // Rows of one score stand in their order, whichever vectors they have.
        const size_t begin = all.size();
        const double score = at->score;
        for (; at != firsts.end() && at->score == score; ++at) {
            auto member = std::lower_bound(members_.begin(), members_.end(),
                                           std::make_pair(at->row, at->row));
            for (int64_t i = 0; i < k && member != members_.end() && member->first == at->row;
                 ++i, ++member)
                all.push_back({score, member->second});
        }
        std::sort(all.begin() + begin, all.end());
    }
    return all;
}

}  // namespace mrl
