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
#include "cpu/search/shortlist.h"
#include "cpu/search/wide.h"
#include "cpu/threads.h"

namespace mrl {

std::atomic<int64_t> seed_columns{2800};

namespace {

constexpr int64_t SAMPLE_STEP = 16;  // every 16th tile makes a guess at θ
constexpr int64_t SEED_STEP = 2;  // every second makes a first real one; every tile where codes do
constexpr int64_t CODED_STEP = 64;     // the most that is between two tiles of a ladder's sample
constexpr int64_t PREDICT_TILES = 48;  // predict what bounds leave
constexpr int64_t MANY = 128;  // rows a neighbour: where there are fewer, each is scored in fp64
constexpr int64_t FEW_QUERIES = 4;  // tell for all whether bounds pay
constexpr int64_t PANEL_BYTES = 512 << 10, PASS_BYTES = int64_t(256) << 20;  // of one pass

Panel panel_of(const Problem& p, const std::vector<int64_t>& which) {
    if (p.coded()) {
        std::vector<CodedQuery> coded;
        for (int64_t q : which) coded.push_back(p.codes[q]);
        return Panel(coded);
    }
    return Panel(p.some(which).queries, p.prefix());
}

// Whether so many neighbours are wanted that choosing rows first costs more than scoring all in
// fp64.
bool many(const Problem& p) {
    constexpr int64_t FEW = 22;  // neighbours, of which a list is cheap whatever the rows
    return p.rows.eligible() <= MANY * std::max<int64_t>(p.k - FEW, 0) + 2 * p.k;
}

// Whether bounds that serve this share of the queries save less than first θs cost. The more
// queries share a scan of all rows, the less it costs each.
bool saves_little(const Problem& p, double share) {
    const double scan = double(p.rows.eligible()) * p.dim,
                 seeds = seed_columns * (8.0 * p.k + 64.0) * std::sqrt(double(p.data.size()));
    return share * scan < seeds;
}

// Which of the best of every step-th tile a guess at θ is. Of the k best of all rows, k / step are
// expected among these. A scan by codes is made anew where a guess was too high, so that theirs is
// one that hardly ever is.
int64_t guessed_rank(const Problem& p, int64_t step) {
    if (!p.laddered()) return (p.k + step - 1) / step;
    const double expected = double(p.k) / double(step);
    return std::min(p.k, int64_t(std::ceil(expected + 2.0 * std::sqrt(expected) + 1.0)));
}

// What of rows a first θ is made by: their first columns, or codes of these; of a ladder four bits
// where some are read, and signs where all are.
Source seeding(const Problem& p, int64_t step) {
    return !p.coded() ? p.terms.source : p.laddered() && step == 1 ? Source::SIGNS : p.source();
}

// Reranks what looks best by the prefix among every step-th tile and raises θ to the k-th best fp64
// score of these rows; also makes a guess at the θ of all rows.
Status seed(Problem& p, const std::vector<int64_t>& which, int64_t step, int threads,
            std::vector<double>* guess) {
    const int64_t n = which.size();
    if (n == 0) return Status::OK;
    const Gathered gathered = p.some(which);
    const Source source = seeding(p, step);
    // One bit of a column tells less than its number does, so that more rows are reranked.
    const int64_t most = source == Source::SIGNS ? 8 * p.k + 64 : 2 * p.k + 32, dim = p.prefix(),
                  keep = std::min(most, p.rows.eligible());
    std::unique_ptr<Entry[]> entries(new Entry[n * keep + 1]);
    std::vector<int64_t> counts(n);
    Status status = scan_all({p.kernels, threads}, p.rows, gathered.queries,
                             {p.metric, source, dim, keep, step}, entries.get(), counts.data());
    if (status != Status::OK) return status;
    each(n, threads, [&](int64_t i) {
        const int64_t q = which[i];
        const Entry* mine = entries.get() + i * keep;
        std::vector<Entry> candidates(mine, mine + counts[i]);
        std::vector<float> room;
        // An overflow shows again in the scores of the end.
        if (p.coded())
            rank_row_major(p.kernels, p.rows, p.data[q], p.metric, {p.dim, p.k}, &candidates);
        else
            advance_all(p.kernels, p.rows, p.data[q], {p.metric, dim, p.dim, p.k}, candidates);
        std::vector<double> scores;
        for (const Entry& entry : candidates)
            scores.push_back(p.score(q, row_of(entry.key), &room));
        std::sort(scores.rbegin(), scores.rend());
        const int64_t rank = guessed_rank(p, step);
        if (rank <= int64_t(scores.size())) (*guess)[q] = scores[rank - 1];
        if (int64_t(scores.size()) == p.k) raise(p.theta[q], scores.back());
    });
    return Status::OK;
}

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
            if (!pass.run(at * chunk, std::min(last * chunk, tiles), nullptr))
                finite = false;
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

// Leaves in `which` the queries for which bounds cost less than reading every row does, by a sample
// of the rows and a guess at each θ, and moves the others to `full`.
void split(Problem& p, const std::vector<double>& guess, int64_t step, int threads,
           std::vector<int64_t>* which, std::vector<int64_t>* full) {
    if (which->empty()) return;
    const std::vector<int64_t> all = *which;
    const int64_t n = all.size();
    const Panel panel = panel_of(p, all);
    const int64_t tiles = TileReader::count(p.rows, p.source()),
                  sampled = std::min(tiles, PREDICT_TILES);
    // In columns: what a scan of the rows costs, less that of the prefix, of fewer bytes where it
    // is of codes.
    const double row = double(p.rows.eligible()) / tiles * p.dim,
                 tile = double(TILE) * p.prefix() * p.column_bytes() / 4.0;
    // A gathered column costs as much as several of a scan for so many queries: of memory at a few,
    // of arithmetic at many.
    auto budget = [&](int64_t queries) {
        return sampled * (row - tile) / std::min(3.0 + 0.5 * queries, 10.0);
    };
    const Pass::Trial trial = {guess, budget(1)};
    std::vector<std::atomic<int64_t>> columns(n);
    for (std::atomic<int64_t>& count : columns) count = 0;
    Ranges ranges(sampled, 1);
    parallel(threads_for(trial.budget * n, threads), [&](int) {
        Pass pass(p, all, panel);
        for (int64_t at, last; ranges.next(&at, &last);) {
            const int64_t tile = at * tiles / sampled / step * step;  // one that is in cache
            pass.run(tile, tile + 1, &trial);
        }
        for (int64_t i = 0; i < n; ++i) columns[i] += pass.columns_read[i];
    });
    for (int64_t i = 0; i < n; ++i) p.predicted[all[i]] = double(columns[i]) / double(sampled);
    // The fewer give up, the more their scan costs each, so that fewer still do.
    auto gives_up = [&](int64_t i, int64_t with) { return columns[i] >= budget(with); };
    const int64_t before = full->size();
    int64_t with = n + before;
    for (int64_t last = 0; last != with;) {
        last = with;
        with = before;
        for (int64_t i = 0; i < n; ++i) with += gives_up(i, last);
    }
    which->clear();
    for (int64_t i = 0; i < n; ++i) (gives_up(i, with) ? full : which)->push_back(all[i]);
}

Status search_pass(Problem& p, Rows& rows, int threads, std::vector<std::vector<Final>>* best) {
    std::vector<int64_t> bounded(p.data.size()), full;
    std::iota(bounded.begin(), bounded.end(), 0);
    std::vector<double> guess(bounded.size(), -INFINITY);
    if (!p.prunes() || !rows.gathered_rows.empty() || many(p) || saves_little(p, 1.0)) {
        full.swap(bounded);
    } else {
        // Where a mask thins rows out, more tiles are sampled, so that as many rows are.
        const double full_tiles = double(rows.eligible()) / TILE,
                     filled = full_tiles / TileReader::count(p.rows, p.source()),
                     most = p.laddered() ? CODED_STEP : SAMPLE_STEP;
        const int64_t step =
            std::clamp<int64_t>(rows.eligible() / (8 * p.k + 4095), 1,
                                std::max<int64_t>(1, int64_t(most * filled)));
        std::vector<int64_t> some, others;
        Status status = Status::OK;
        if (!p.laddered() && int64_t(bounded.size()) >= 4 * FEW_QUERIES) {
            for (size_t i = 0; i < FEW_QUERIES; ++i)
                some.push_back(bounded[i * bounded.size() / FEW_QUERIES]);
            status = seed(p, some, step, threads, &guess);
            if (status != Status::OK) return status;
            split(p, guess, step, threads, &some, &others);
            if (saves_little(p, double(some.size()) / FEW_QUERIES)) full.swap(bounded);
        }
        status = seed(p, bounded, step, threads, &guess);
        if (status != Status::OK) return status;
        split(p, guess, step, threads, &bounded, &full);
        const int64_t seed_step = p.coded() ? 1 : SEED_STEP;
        if (p.laddered()) {
            // A scan makes θ better as it goes. For queries whose scan would refine many rows
            // meanwhile, every tile makes a first one, where bounds pay for most.
            const double many_columns = double(TILE) * p.dim / 40.0;
            const auto easy = std::partition(bounded.begin(), bounded.end(), [&](int64_t q) {
                return p.predicted[q] < many_columns;
            });
            if (step > 1 && full.size() < bounded.size()) {
                some.swap(full);
                some.insert(some.end(), easy, bounded.end());
                bounded.erase(easy, bounded.end());
                status = seed(p, some, 1, threads, &guess);
                if (status != Status::OK) return status;
                split(p, guess, 1, threads, &some, &full);
                bounded.insert(bounded.end(), some.begin(), some.end());
            }
        } else if (step > seed_step) {
            // The first guess was rough. Where bounds pay for most queries, a better one may make
            // them pay for the others.
            if (full.size() < bounded.size()) {
                bounded.insert(bounded.end(), full.begin(), full.end());
                full.clear();
            }
            status = seed(p, bounded, seed_step, threads, &guess);
            if (status != Status::OK) return status;
            split(p, guess, seed_step, threads, &bounded, &full);
        }
        if (seed_step > 1) {
            // Where the proven θ is too low for bounds to pay, every tile makes another.
            std::vector<double> proved(p.theta.begin(), p.theta.end());
            std::vector<int64_t> low;
            split(p, proved, 1, threads, &bounded, &low);
            status = seed(p, low, 1, threads, &guess);
            if (status != Status::OK) return status;
            bounded.insert(bounded.end(), low.begin(), low.end());
        }
    }
    if (!full.empty() && 8 * rows.eligible() < 7 * rows.count()) rows.gather();
    std::vector<int64_t> undecided, wide;
    const Status status = search_fully(p, rows, full, threads, &undecided, best);
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
                    (*found)[begin + q].push_back({score, id_of(rows, final.row)});
            }
        });
    }
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

}  // namespace mrl
