// Certified exact search: rows that provably cannot be among the k best are dropped level by level,
// the few others are scored in fp64. θ is near its final value from the start: it is the k-th best
// score among the rows whose prefixes look best.
//
// Where a sample says that bounds will not pay for a query, all rows are scored in fp32, and the
// best again in fp64. Where so many rows are among the best, or so close to them, that fp32 cannot
// choose, every row is scored in fp64: one of each vector, where many are equal.
#include <algorithm>
#include <mutex>
#include <numeric>

#include "cpu/search/bounds.h"
#include "cpu/search/clusters.h"
#include "cpu/search/equal_rows.h"
#include "cpu/search/plan.h"
#include "cpu/search/shortlist.h"
#include "cpu/search/wide.h"
#include "cpu/threads.h"

namespace mrl {

namespace {

constexpr int64_t PANEL_BYTES = 512 << 10, PASS_BYTES = int64_t(256) << 20;  // of one pass

// The k best, in order.
void cut(std::vector<Final>* best, int64_t k) {
    if (k < int64_t(best->size())) {
        std::nth_element(best->begin(), best->begin() + k, best->end());
        best->resize(k);
    }
    std::sort(best->begin(), best->end());
}

// Bounds every row of some of the queries; appends each thread's best to theirs.
bool scan_bounded(Problem& p, const std::vector<int64_t>& which, int threads,
                  std::vector<std::vector<Final>>* best) {
    if (which.empty()) return true;
    const Panel panel = panel_of(p, which);
    const int64_t tiles = TileReader::count(p.rows, p.source());
    threads = threads_for(double(tiles) * TILE * p.prefix() * which.size(), threads);
    std::atomic<bool> finite{true};
    const int64_t chunk = p.chunk_tiles();
    Ranges ranges((tiles + chunk - 1) / chunk, 1);
    std::mutex merging;
    parallel(threads, [&](int) {
        Pass pass(p, which, panel);
        for (int64_t at, last; ranges.next(&at, &last);)
            if (!pass.run(at * chunk, std::min(last * chunk, tiles), nullptr)) finite = false;
        pass.score_late();
        const std::lock_guard<std::mutex> lock(merging);
        for (size_t i = 0; i < which.size(); ++i) {
            std::vector<Final>& all = (*best)[which[i]];
            all.insert(all.end(), pass.heaps[i].begin(), pass.heaps[i].end());
        }
    });
    return finite;
}

// The same, with guesses at θ: once more for queries whose k best do not reach theirs.
bool scan_guessed(Problem& p, const std::vector<int64_t>& which, const std::vector<double>& guess,
                  int threads, std::vector<std::vector<Final>>* best) {
    const std::vector<double> proved(p.theta.begin(), p.theta.end());
    for (int64_t q : which) raise(p.theta[q], guess[q]);
    if (!scan_bounded(p, which, threads, best)) return false;
    std::vector<int64_t> again;
    for (int64_t q : which) {
        std::vector<Final>& found = (*best)[q];
        cut(&found, p.k);
        const double kth = int64_t(found.size()) < p.k ? -INFINITY : found.back().score;
        if (kth >= guess[q]) continue;
        p.theta[q] = std::max(proved[q], kth);
        found.clear();
        again.push_back(q);
    }
    return scan_bounded(p, again, threads, best);
}

Status search_pass(Problem& p, Rows& rows, int threads, std::vector<std::vector<Final>>* best);

// Searches one row of each vector, where many rows are equal.
Status search_firsts(Problem& p, const EqualRows& equal, const std::vector<int64_t>& which,
                     int threads, std::vector<std::vector<Final>>* best) {
    Rows gathered = equal.firsts(p.rows), in_place = gathered;
    in_place.gathered_rows.clear();
    const Gathered queries = p.some(which);
    Problem firsts(p.kernels, in_place, queries.queries, p.metric, p.dim,
                   std::min(p.k, equal.count()));
    std::vector<std::vector<Final>> found(which.size());
    const Status status = search_pass(firsts, gathered, threads, &found);
    if (status != Status::OK) return status;
    each(which.size(), threads, [&](int64_t i) {
        std::sort(found[i].begin(), found[i].end());
        (*best)[which[i]] = equal.expand(found[i], p.k);
        p.touched[which[i]] = p.rows.eligible();
    });
    return Status::OK;
}

// Searches rows of which many score alike: one of each vector where many are equal, and tight
// clusters, where there are queries enough to pay for finding them; else by what sets rows apart,
// else every row in fp64.
Status search_alike(Problem& p, const Rows& rows, const std::vector<int64_t>& which, int threads,
                    std::vector<std::vector<Final>>* best) {
    constexpr size_t ENOUGH = 16, ENOUGH_FOR_CLUSTERS = 96;
    if (which.size() >= ENOUGH) {
        const std::vector<Projected> sorted = project({p.kernels, threads}, p.rows, p.dim);
        const EqualRows equal(p, sorted, threads);
        if (2 * equal.count() <= p.rows.eligible())
            return search_firsts(p, equal, which, threads, best);
        if (which.size() >= ENOUGH_FOR_CLUSTERS) {
            Clusters clusters(p, sorted, threads);
            if (clusters.narrow(p, which)) return clusters.search(p, threads, best);
        }
    }
    bool alike;
    Status status = sees_alike(p, rows, which, shortlist_by_differences, threads, &alike);
    if (status != Status::OK) return status;
    if (alike) return scan_wide(p, rows, which, threads, best);
    std::vector<int64_t> undecided;
    status = scan_narrow(p, rows, which, shortlist_by_differences, last_length(p), threads,
                         &undecided, best);
    if (status != Status::OK) return status;
    return scan_wide(p, rows, undecided, threads, best);
}

// Reads every row, in the way that fits k and the data. Queries that it cannot decide, because
// more rows score alike than a sample said, go to `undecided`.
Status search_fully(Problem& p, const Rows& rows, const std::vector<int64_t>& which, int threads,
                    std::vector<int64_t>* undecided, std::vector<std::vector<Final>>* best) {
    if (which.empty()) return Status::OK;
    if (many(p)) return scan_wide(p, rows, which, threads, best);
    bool alike;
    Status status = sees_alike(p, rows, which, shortlist_by_scores, threads, &alike);
    if (status != Status::OK) return status;
    if (alike) return search_alike(p, rows, which, threads, best);
    // A short list decides most queries; where it does not decide the first, all have a long one.
    constexpr size_t ENOUGH = 8 * MAX_GROUP;
    std::vector<int64_t> rest = which, first, open;
    if (which.size() >= ENOUGH) {
        first.assign(which.begin(), which.begin() + MAX_GROUP);
        rest.erase(rest.begin(), rest.begin() + MAX_GROUP);
    }
    status =
        scan_narrow(p, rows, first, shortlist_by_scores, first_length(p), threads, &open, best);
    if (status != Status::OK) return status;
    if (2 * open.size() > first.size()) {
        open.insert(open.end(), rest.begin(), rest.end());
    } else {
        status =
            scan_narrow(p, rows, rest, shortlist_by_scores, first_length(p), threads, &open, best);
        if (status != Status::OK) return status;
    }
    return scan_narrow(p, rows, open, shortlist_by_scores, last_length(p), threads, undecided,
                       best);
}

Status search_pass(Problem& p, Rows& rows, int threads, std::vector<std::vector<Final>>* best) {
    Plan plan;
    Status status = make_plan(p, rows.gathered_rows.empty(), threads, &plan);
    if (status != Status::OK) return status;
    auto& [bounded, full, guess] = plan;
    if (!full.empty() && 8 * rows.eligible() < 7 * rows.count()) rows.gather();
    std::vector<int64_t> undecided, wide;
    status = search_fully(p, rows, full, threads, &undecided, best);
    if (status != Status::OK) return status;
    if (p.prunes()) {
        const std::vector<double> proved(p.theta.begin(), p.theta.end());
        split(p, proved, 1, threads, &undecided, &wide);
        bounded.insert(bounded.end(), undecided.begin(), undecided.end());
    } else {
        wide.swap(undecided);
    }
    const bool all_finite = p.laddered() ? scan_guessed(p, bounded, guess, threads, best)
                                         : scan_bounded(p, bounded, threads, best);
    if (!all_finite) return Status::NOT_FINITE;
    return scan_wide(p, rows, wide, threads, best);
}

}  // namespace

Status exact_search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                    Stage stage, const Results& results, int64_t* touched) {
    const int64_t dim = stage.dim, k = stage.keep;
    const int threads = run.threads;
    rows.check();
    if (!finite(queries, dim)) return Status::QUERY_NOT_FINITE;
    std::atomic<bool> overflow{false};
    Rows in_place = rows, gathered = rows;
    in_place.gathered_rows.clear();
    const int64_t keep = std::max<int64_t>(std::min(k, rows.eligible()), 1);
    const int64_t pass =
        std::clamp<int64_t>(PASS_BYTES / int64_t(2 * sizeof(Final) * threads * keep +
                                                 sizeof(Entry) * CHUNK_TILES * TILE),
                            1, std::clamp<int64_t>(PANEL_BYTES / (4 * dim), 96, 256));
    for (int64_t begin = 0; begin < queries.n; begin += pass) {
        const int64_t n = std::min(pass, queries.n - begin);
        const Queries part = {queries.data + begin * queries.stride, n, queries.stride};
        std::vector<std::vector<Final>> best(n);
        std::unique_ptr<Problem> problem(
            new Problem(run.kernels, in_place, part, metric, dim, keep));
        if (rows.eligible() > 0) {
            const Status status = search_pass(*problem, gathered, threads, &best);
            if (status != Status::OK) return status;
        }
        each(n, threads, [&](int64_t q) {
            cut(&best[q], k);
            for (int64_t i = 0; i < k; ++i) {
                const bool found = i < int64_t(best[q].size());
                const int64_t at = (begin + q) * k + i;
                results.scores[at] = found ? float(best[q][i].score) : -INFINITY;
                results.ids[at] = found ? id_of(rows, best[q][i].row) : -1;
                if (results.scores64) results.scores64[at] = found ? best[q][i].score : -INFINITY;
                if (found && std::isinf(results.scores[at])) overflow = true;
            }
            touched[begin + q] = std::min<int64_t>(problem->touched[q], rows.eligible());
        });
    }
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

Status range_search(const Run& run, const Rows& rows, const Queries& queries, Metric metric,
                    int64_t dim, double threshold, std::vector<std::vector<Neighbour>>* found) {
    rows.check();
    found->assign(queries.n, {});
    if (!finite(queries, dim)) return Status::QUERY_NOT_FINITE;
    std::atomic<bool> overflow{false};
    Rows in_place = rows;
    in_place.gathered_rows.clear();
    constexpr int64_t PASS = 96;  // queries
    for (int64_t begin = 0; begin < queries.n && rows.eligible() > 0; begin += PASS) {
        const int64_t n = std::min(PASS, queries.n - begin);
        const Queries part = {queries.data + begin * queries.stride, n, queries.stride};
        // More than there are, so that every row that reaches θ is kept.
        std::unique_ptr<Problem> problem(
            new Problem(run.kernels, in_place, part, metric, dim, rows.count() + 1));
        // Some scores a little below round to the threshold.
        const double theta = threshold - 1e-7 * std::abs(threshold) - 1e-36;
        for (std::atomic<double>& each_theta : problem->theta) each_theta = theta;
        std::vector<int64_t> all(n);
        std::iota(all.begin(), all.end(), 0);
        std::vector<std::vector<Final>> best(n);
        // Bounds need statistics of the columns that are searched.
        const Status status =
            !problem->is_described() ? scan_wide(*problem, rows, all, run.threads, &best)
            : scan_bounded(*problem, all, run.threads, &best) ? Status::OK
                                                              : Status::NOT_FINITE;
        if (status != Status::OK) return status;
        each(n, run.threads, [&](int64_t q) {
            std::sort(best[q].begin(), best[q].end());
            for (const Final& final : best[q]) {
                const float score = float(final.score);
                if (std::isinf(score)) overflow = true;
                if (score >= threshold)
                    (*found)[begin + q].push_back({score, id_of(rows, final.row), final.score});
            }
        });
    }
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

}  // namespace mrl
