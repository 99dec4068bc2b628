// Sums over the rows less a common centre, which order as scores do:
// ⟨q, x⟩ = ⟨q, c⟩ + ⟨q, y⟩, y = x − c, and ‖x‖² − ‖c‖² = 2⟨c, y⟩ + ‖y‖². With A = ⟨q, c⟩,
//   product·⟨q, x⟩ − squares·‖x‖²  is, but for what is of the query,  product·⟨q, y⟩ − squares·t
//   ⟨q, x⟩ / (‖q‖·‖x‖)             likewise  ⟨q, y⟩ / (‖q‖·‖x‖) − A / (‖q‖·‖c‖) · u
// where t = ‖x‖² − ‖c‖² and u = (‖x‖ − ‖c‖) / ‖x‖. All are as small as y is, and so are what fp32
// makes of them.
#include <algorithm>
#include <mutex>

#include "cpu/search/shortlist.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

// The mean of up to SAMPLED tiles' rows.
std::vector<float> centre_of(const Problem& p, const Rows& rows) {
    constexpr int64_t SAMPLED = 64;
    const int64_t tiles = TileReader::count(rows, Source::PRODUCT),
                  sampled = std::min(tiles, SAMPLED);
    std::vector<double> sums(p.dim);
    int64_t count = 0;
    TileReader reader(p.kernels, rows, Source::PRODUCT, p.dim, 1);
    Scan scan = {};
    for (int64_t i = 0; i < sampled; ++i) {
        reader.read(i * tiles / sampled, &scan);
        count += __builtin_popcountll(scan.wanted);
        double* sum = sums.data();
        for (const Segment& segment : scan.segments)
            for (int64_t c = 0; c < segment.cols; ++c, ++sum)
                for (uint64_t lanes = scan.wanted; lanes; lanes &= lanes - 1)
                    *sum += segment.tile[c * TILE + __builtin_ctzll(lanes)];
    }
    std::vector<float> centre;
    for (double sum : sums) centre.push_back(float(sum / std::max<int64_t>(count, 1)));
    return centre;
}

// A tile's rows less the centre, and what turns their sums into scores.
class Differences {
  public:
    Differences(const Problem& p, const std::vector<float>& centre)
        : p_(p), centre_(centre), tile_(p.dim * TILE) {
        square_ = p.kernels.dot64(centre.data(), centre.data(), p.dim);
    }
    void prepare(Scan* scan) {
        float* y = tile_.data();
        const float* centre = centre_.data();
        for (const Segment& segment : scan->segments)
            for (int64_t c = 0; c < segment.cols; ++c, y += TILE, ++centre)
                for (int r = 0; r < TILE; ++r) y[r] = segment.tile[c * TILE + r] - *centre;
        scan->segments[0] = {tile_.data(), p_.dim};
        scan->segments[1] = {nullptr, 0};
        float squares[TILE] = {}, products[TILE] = {};  // ‖y‖², ⟨c, y⟩
        p_.kernels.sqnorms(scan->segments[0], squares);
        for (uint64_t lanes = scan->wanted; lanes; lanes &= lanes - 1)
            largest = std::max(largest, squares[__builtin_ctzll(lanes)]);
        if (!p_.terms.normalized && p_.terms.squares == 0.0f) return;
        p_.kernels.advance(Source::PRODUCT, scan->segments[0], centre_.data(), products);
        for (int r = 0; r < TILE; ++r) {
            const double beyond = 2.0 * products[r] + squares[r],
                         norm = std::sqrt(std::max(square_ + beyond, 0.0));
            if (scan->wanted >> r & 1) least = std::min(least, norm);
            row_scale_[r] = p_.terms.normalized ? float(1.0 / norm) : 1.0f;
            terms_[r] =
                float(p_.terms.normalized ? beyond / ((norm + std::sqrt(square_)) * norm) : beyond);
        }
        scan->row_scale = row_scale_;
        scan->term_values[0] = terms_;
        scan->terms = 1;
    }

    float largest = 0.0f;     // ‖y‖² of the rows so far; infinite where one is beyond fp32
    double least = INFINITY;  // ‖x‖, where it counts

  private:
    const Problem& p_;
    const std::vector<float>& centre_;
    double square_;  // ‖c‖²
    std::vector<float> tile_;
    float row_scale_[TILE], terms_[TILE];
};

// Each query's factors of those sums.
struct Factors {
    Factors(const Problem& p, const std::vector<int64_t>& which, const Panel& panel,
            const std::vector<float>& centre, double centre_norm)
        : scales(which.size()), terms(which.size()) {
        for (const Panel::Group& group : panel.groups())
            for (int64_t i = group.first; i < group.first + group.size; ++i) {
                const int64_t q = which[i];
                const double along = p.kernels.dot64(p.data[q], centre.data(), p.dim);
                scales[i] = float(p.unit(q));
                terms[i] =
                    float(p.terms.normalized ? -along * p.unit(q) / centre_norm : -p.terms.squares);
            }
    }
    std::vector<float> scales, terms;
};

}  // namespace

Shortlist shortlist_by_differences(const Problem& p, const Rows& rows,
                                   const std::vector<int64_t>& which, int64_t keep, int64_t step,
                                   int threads) {
    Shortlist list(p, which, keep);
    const int64_t n = which.size(),
                  tiles = (TileReader::count(rows, Source::PRODUCT) + step - 1) / step;
    const std::vector<float> centre = centre_of(p, rows);
    const double length = std::sqrt(p.kernels.dot64(centre.data(), centre.data(), p.dim));
    const Panel panel(list.data.queries, p.dim);
    const Factors factors(p, which, panel, centre, length);
    std::vector<std::vector<Entry>> best(n);
    float largest = 0.0f;
    double least = INFINITY;
    std::atomic<bool> finite{true};
    std::mutex merging;
    Ranges ranges(tiles, 8);
    parallel(threads_for(double(tiles) * TILE * p.dim * n, threads), [&](int) {
        Kept mine(std::vector<float>(n, NAN).data(), n, keep, rows.count());
        TileReader reader(p.kernels, rows, Source::PRODUCT, p.dim, panel.groups().size());
        Differences differences(p, centre);
        Scan scan = {};
        for (int64_t at, last; ranges.next(&at, &last);)
            for (; at < last; ++at) {
                poll();
                if (!reader.read(at * step, &scan)) finite = false;
                differences.prepare(&scan);
                for (const Panel::Group& group : panel.groups()) {
                    scan.panel = group.data;
                    scan.query_scale = factors.scales.data() + group.first;
                    scan.term_factors = factors.terms.data() + group.first;
                    scan.topk = mine.topks.data() + group.first;
                    scan.thresholds = mine.thresholds.data() + group.first;
                    p.kernels.scan[int(Source::PRODUCT)][group.size - 1](scan);
                }
            }
        const std::lock_guard<std::mutex> lock(merging);
        largest = std::max(largest, differences.largest);
        least = std::min(least, differences.least);
        for (int64_t i = 0; i < n; ++i)
            best[i].insert(best[i].end(), mine.topks[i].entries,
                           mine.topks[i].entries + mine.topks[i].count);
    });
    if (!finite) list.status = Status::NOT_FINITE;
    // A square that underflows loses less than 2e-38, whether denormals are kept or not.
    const double far = std::sqrt((1.0 + 2.0 * p.margin) * double(largest) + 2e-38 * double(p.dim)),
                 beyond = (2.0 * length + far) * far, room = 2.0 * p.margin;
    const bool inside = far * far < LARGEST && length * length < LARGEST;
    each(n, threads, [&](int64_t i) {
        const double norm = p.norm[which[i]];
        cut(best[i], keep);
        list.counts[i] = best[i].size();
        std::copy(best[i].begin(), best[i].end(), list.entries.get() + i * keep);
        if (TileReader::gathers(rows, Source::PRODUCT))
            for (Entry *e = list.entries.get() + i * keep, *end = e + list.counts[i]; e < end; ++e)
                e->key = with_row(e->key, rows.gathered_rows[row_of(e->key)]);
        if (!inside || !ordinary(norm * norm)) return;
        if (!p.terms.normalized)
            list.absolute[i] =
                room * (p.terms.product * norm * far + p.terms.squares * beyond) + underflow(p.dim);
        else if (norm > 0.0 && length > 0.0 && least * least > SMALLEST)
            list.absolute[i] =
                room * p.terms.product * (far + beyond / length) / least + underflow(p.dim);
    });
    return list;
}

}  // namespace mrl
