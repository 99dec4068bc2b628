#include "cpu/search/wide.h"

#include <algorithm>
#include <mutex>

#include "cpu/threads.h"

namespace mrl {
namespace {

// Groups of queries as scores64 reads them: fp64, columns by chain.
struct WidePanel {
    struct Group {
        int64_t first, size;  // of the queries
        std::vector<double> columns;
    };
    std::vector<Group> groups;
    WidePanel(const Problem& p, const std::vector<int64_t>& which, int64_t chains) {
        for (int64_t first = 0, n = which.size(); first < n; first += MAX_GROUP) {
            groups.push_back({first, std::min<int64_t>(MAX_GROUP, n - first), {}});
            for (int64_t chain = 0; chain < chains; ++chain)
                for (int64_t c = chain; c < p.dim; c += chains)
                    for (int64_t i = first; i < first + groups.back().size; ++i)
                        groups.back().columns.push_back(p.data[which[i]][c]);
        }
    }
};

// One query's k best of the rows that a thread has seen, which come in ascending order.
class KeptFinals {
  public:
    KeptFinals(double theta, int64_t k) : threshold_(std::nextafter(theta, -INFINITY)), k_(k) {}
    const std::vector<Final>& all() const { return all_; }

    double threshold() const { return threshold_; }
    // Keeps the lanes above the threshold among these; row_at(lane) is a lane's row.
    template <class RowAt>
    void keep(const double* scores, uint64_t lanes, const RowAt& row_at) {
        for (; lanes; lanes &= lanes - 1) {
            const int r = __builtin_ctzll(lanes);
            // A later row with the score of the k-th comes after it.
            if (scores[r] > threshold_) push({scores[r], row_at(r)});
        }
    }

  private:
    void push(const Final& final) {
        all_.push_back(final);
        if (int64_t(all_.size()) < k_ + std::max<int64_t>(k_, 32)) return;
        std::nth_element(all_.begin(), all_.begin() + k_ - 1, all_.end());
        all_.resize(k_);
        threshold_ = all_.back().score;
    }
    std::vector<Final> all_;
    double threshold_;
    const int64_t k_;
};

}  // namespace

Status scan_wide(Problem& p, const Rows& rows, const std::vector<int64_t>& which, int threads,
                 std::vector<std::vector<Final>>* best) {
    if (which.empty()) return Status::OK;
    const Source source = p.terms.source;
    const WidePanel panel(p, which, chains_of(source));
    const bool gathers = TileReader::gathers(rows, Source::PRODUCT);
    const int64_t tiles = TileReader::count(rows, Source::PRODUCT), groups = panel.groups.size();
    std::atomic<bool> finite{true};
    std::mutex merging;
    Ranges ranges(tiles, std::clamp<int64_t>(tiles / (8 * threads), 1, 8));
    parallel(threads_for(2.0 * tiles * TILE * p.dim * which.size(), threads), [&](int) {
        TileReader reader(p.kernels, rows, Source::PRODUCT, p.dim, groups);
        std::vector<double> tile(p.dim * TILE), scores(MAX_GROUP * TILE), norms(TILE);
        std::vector<KeptFinals> kept;
        for (int64_t q : which) kept.emplace_back(p.theta[q], p.k);
        Scan scan = {};
        for (int64_t at, last; ranges.next(&at, &last);)
            for (; at < last; ++at) {
                poll();
                if (!reader.read(at, &scan)) finite = false;
                const auto row_at = [&](int lane) {
                    const int64_t row = scan.first_row + lane;
                    return gathers ? rows.gathered_rows[row] : row;
                };
                p.kernels.widen_tile[int(source)](scan.segments, tile.data());
                if (p.terms.normalized) {
                    p.kernels.squares64(tile.data(), p.dim, norms.data());
                    for (double& norm : norms) norm = std::sqrt(norm);
                }
                for (const WidePanel::Group& group : panel.groups) {
                    p.kernels.scores64[int(source)][group.size - 1](
                        tile.data(), group.columns.data(), p.dim, &scan.ahead, scores.data());
                    for (int64_t i = 0; i < group.size; ++i) {
                        double* mine = scores.data() + i * TILE;
                        KeptFinals& best_of = kept[group.first + i];
                        const uint64_t lanes = p.kernels.finish64(
                            p.scale(), p.norm[which[group.first + i]],
                            p.terms.normalized ? norms.data() : nullptr, best_of.threshold(), mine);
                        best_of.keep(mine, lanes & scan.wanted, row_at);
                    }
                }
            }
        const std::lock_guard<std::mutex> lock(merging);
        for (size_t i = 0; i < which.size(); ++i) {
            std::vector<Final>& all = (*best)[which[i]];
            all.insert(all.end(), kept[i].all().begin(), kept[i].all().end());
        }
    });
    for (int64_t q : which) p.touched[q] += rows.eligible();
    return finite ? Status::OK : Status::NOT_FINITE;
}

}  // namespace mrl
