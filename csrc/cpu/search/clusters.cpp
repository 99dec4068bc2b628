#include "cpu/search/clusters.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "cpu/search/wide.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

constexpr int64_t MOST = 256;       // clusters, numbered by uint8
constexpr int64_t FEWEST = 256;     // rows of a cluster; rows of smaller groups make one together
constexpr double GAP = 1.0 / 4096;  // between clusters, as a share of the range of the sums
constexpr int64_t SHARE = 5;  // scoring one pair in so many in fp64 costs less than a scan in fp32

// Rows whose sums differ by more, with none between them, are in different clusters.
float gap_of(const std::vector<Projected>& rows, float Projected::* sum) {
    const auto [least, most] = std::minmax_element(
        rows.begin(), rows.end(),
        [&](const Projected& a, const Projected& b) { return a.*sum < b.*sum; });
    return float(GAP * (double((*most).*sum) - double((*least).*sum)));
}

// Calls `see(begin, end)` for each run of rows without a gap; rows ascend by that sum.
template <class See>
void each_run(const std::vector<Projected>& rows, float Projected::* sum, float gap,
              const See& see) {
    for (auto begin = rows.begin(), end = begin; begin != rows.end(); begin = end) {
        for (end = begin + 1; end != rows.end() && (*end).*sum - end[-1].*sum <= gap;) ++end;
        see(begin, end);
    }
}

}  // namespace

Clusters::Clusters(const Problem& p, const std::vector<Projected>& rows, int threads) {
    const float gap = gap_of(rows, &Projected::sum), other_gap = gap_of(rows, &Projected::other);
    std::vector<int64_t> rest;
    // The second sum may tell apart clusters that the first does not.
    each_run(rows, &Projected::sum, gap, [&](auto begin, auto end) {
        std::vector<Projected> run(begin, end);
        std::sort(run.begin(), run.end(),
                  [](const Projected& a, const Projected& b) { return a.other < b.other; });
        each_run(run, &Projected::other, other_gap, [&](auto first, auto last) {
            const bool few = last - first < FEWEST;
            if (!few) clusters_.push_back({int64_t(order_.size()), last - first, {}});
            for (; first != last; ++first) (few ? rest : order_).push_back(first->bit);
        });
    });
    if (!rest.empty()) {
        clusters_.push_back({int64_t(order_.size()), int64_t(rest.size()), {}});
        order_.insert(order_.end(), rest.begin(), rest.end());
    }
    if (clusters_.size() > size_t(MOST) || clusters_.size() < 2)
        clusters_.clear();
    else
        enclose(p, threads);
}

// Sets the clusters' centres, each one of its rows, and radii.
void Clusters::enclose(const Problem& p, int threads) {
    const int64_t count = clusters_.size();
    std::vector<int64_t> firsts;  // each span's first bit in the mask
    int64_t bits = 0;
    for (const Span& span : p.rows.spans) {
        firsts.push_back(bits);
        bits += span.tiles() * TILE;
    }
    std::vector<uint8_t> cluster_of(bits);
    std::vector<float> centres(p.dim * count);  // [dim, clusters]
    for (int64_t i = 0; i < count; ++i) {
        Cluster& cluster = clusters_[i];
        for (int64_t at = cluster.first; at < cluster.first + cluster.count; ++at)
            cluster_of[order_[at]] = uint8_t(i);
        const int64_t bit = order_[cluster.first];
        const size_t span =
            std::upper_bound(firsts.begin(), firsts.end(), bit) - firsts.begin() - 1;
        p.columns(p.rows.spans[span].first + bit - firsts[span], &cluster.centre);
        for (int64_t c = 0; c < p.dim; ++c) centres[c * count + i] = cluster.centre[c];
    }
    std::vector<float> largest(count);
    std::mutex merging;
    each_tile({p.kernels, threads}, p.rows, p.dim, [&](const Scan& scan, int64_t number) {
        const uint8_t* mine = cluster_of.data() + number * TILE;
        const float* centre = centres.data();
        float squares[TILE] = {};
        for (const Segment& segment : scan.segments)
            for (int64_t c = 0; c < segment.cols; ++c, centre += count)
                for (int r = 0; r < TILE; ++r) {
                    const float y = segment.tile[c * TILE + r] - centre[mine[r]];
                    squares[r] += y * y;
                }
        const std::lock_guard<std::mutex> lock(merging);
        for (uint64_t lanes = scan.wanted; lanes; lanes &= lanes - 1) {
            const int r = __builtin_ctzll(lanes);
            largest[mine[r]] = std::max(largest[mine[r]], squares[r]);
        }
    });
    // A square that underflows loses less than 2e-38, whether denormals are kept or not.
    for (int64_t i = 0; i < count; ++i)
        clusters_[i].radius =
            std::sqrt((1.0 + 2.0 * p.margin) * double(largest[i]) + 2e-38 * double(p.dim));
}

// A range that holds the scores of all of a cluster's rows, with room for the errors of fp64 sums.
Clusters::Range Clusters::scores(const Problem& p, int64_t q, const Cluster& cluster) {
    const float *query = p.data[q], *centre = cluster.centre.data();
    const double length = std::sqrt(p.kernels.dot64(centre, centre, p.dim)),
                 slack = 8.0 * std::ldexp(p.margin, -29), radius = cluster.radius * (1.0 + slack),
                 product = p.terms.product;
    if (!std::isfinite(radius)) return {-INFINITY, INFINITY};
    if (p.terms.source == Source::DIFFERENCE) {
        double square = 0.0;
        for (int64_t c = 0; c < p.dim; ++c) {
            const double difference = double(query[c]) - double(centre[c]);
            square += difference * difference;
        }
        const double distance = std::sqrt(square), reach = radius + slack * distance,
                     near = std::max(distance - reach, 0.0), far = distance + reach;
        return {-p.terms.squares * far * far, -p.terms.squares * near * near};
    }
    const double sum = p.kernels.dot64(query, centre, p.dim), norm = p.norm[q];
    double score = product * sum, reach = product * norm * (radius + slack * length);
    if (p.terms.normalized) {
        // ‖x / ‖x‖ − c / ‖c‖‖ <= 2 ‖x − c‖ / ‖c‖; a row of 0 scores 0, which is within that.
        if (!(norm > 0.0 && length > 0.0)) return {-INFINITY, INFINITY};
        score /= norm * length;
        reach = product * (2.0 * radius / length + slack);
    }
    return {score - reach, score + reach};
}

bool Clusters::narrow(Problem& p, const std::vector<int64_t>& which) {
    if (clusters_.empty()) return false;
    int64_t pairs = 0;
    for (int64_t q : which) {
        std::vector<std::pair<double, int64_t>> lower;
        std::vector<double> upper;
        for (const Cluster& cluster : clusters_) {
            const Range range = scores(p, q, cluster);
            lower.push_back({range.lower, cluster.count});
            upper.push_back(range.upper);
        }
        std::sort(lower.rbegin(), lower.rend());
        int64_t rows = 0;
        for (auto at = lower.begin(); at != lower.end(); ++at)
            if ((rows += at->second) >= p.k) {
                raise(p.theta[q], at->first);
                break;
            }
        for (size_t i = 0; i < clusters_.size(); ++i)
            if (!(upper[i] < p.theta[q])) {
                clusters_[i].queries.push_back(q);
                pairs += clusters_[i].count;
            }
    }
    return pairs * SHARE <= p.rows.eligible() * int64_t(which.size());
}

Status Clusters::search(Problem& p, int threads, std::vector<std::vector<Final>>* best) const {
    std::vector<uint64_t> mask(words_of(p.rows));
    for (const Cluster& cluster : clusters_) {
        std::fill(mask.begin(), mask.end(), 0);
        for (int64_t i = cluster.first; i < cluster.first + cluster.count; ++i)
            mask[order_[i] / TILE] |= uint64_t(1) << order_[i] % TILE;
        Rows rows = p.rows.restricted(mask.data());
        // Rows that fill their tiles are read in place.
        if (2 * cluster.count < TILE * int64_t(rows.tiles.size())) rows.gather();
        const Status status = scan_wide(p, rows, cluster.queries, threads, best);
        if (status != Status::OK) return status;
        for (int64_t q : cluster.queries) {
            std::vector<Final>& mine = (*best)[q];
            if (int64_t(mine.size()) < p.k) continue;
            std::nth_element(mine.begin(), mine.begin() + p.k - 1, mine.end());
            mine.resize(p.k);
            // An earlier row of another cluster may have the same score.
            raise(p.theta[q], std::nextafter(mine.back().score, -INFINITY));
        }
    }
    return Status::OK;
}

}  // namespace mrl
