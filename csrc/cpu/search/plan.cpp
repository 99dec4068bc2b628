#include "cpu/search/plan.h"

#include <algorithm>
#include <numeric>

#include "cpu/threads.h"

namespace mrl {

std::atomic<int64_t> seed_columns{2800};

namespace {

constexpr int64_t SAMPLE_STEP = 16;    // every 16th tile makes a guess at θ
constexpr int64_t SEED_STEP = 2;       // every second makes a first θ; every tile where codes do
constexpr int64_t LADDER_STEP = 64;    // the most that is between two tiles of a ladder's sample
constexpr int64_t PREDICT_TILES = 48;  // predict what bounds leave
constexpr int64_t FEW_QUERIES = 4;     // tell for all whether bounds pay

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
    // Scores by codes may overflow where the rows' own do not: then there is no guess.
    if (status == Status::OVERFLOW_ && p.laddered()) return Status::OK;
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

// A sample makes a guess at each θ, and a scan makes θ better as it goes. For queries whose scan
// would refine many rows meanwhile, every tile makes a first one.
Status plan_ladder(Problem& p, int64_t step, int threads, Plan* plan) {
    auto& [bounded, full, guess] = *plan;
    Status status = seed(p, bounded, step, threads, &guess);
    if (status != Status::OK) return status;
    const std::vector<double> left = split(p, guess, step, threads, &bounded, &full);
    // Where bounds pay for few, no first θ is worth its scan.
    if (step == 1 || full.size() >= bounded.size()) return Status::OK;
    const double many_columns = double(TILE) * p.dim / 50.0;
    const auto hard = std::partition(bounded.begin(), bounded.end(),
                                     [&](int64_t q) { return left[q] < many_columns; });
    std::vector<int64_t> some(hard, bounded.end());
    some.insert(some.end(), full.begin(), full.end());
    bounded.erase(hard, bounded.end());
    full.clear();
    status = seed(p, some, 1, threads, &guess);
    if (status != Status::OK) return status;
    split(p, guess, 1, threads, &some, &full);
    bounded.insert(bounded.end(), some.begin(), some.end());
    return Status::OK;
}

Status plan_prefix(Problem& p, int64_t step, int threads, Plan* plan) {
    auto& [bounded, full, guess] = *plan;
    Status status = Status::OK;
    if (int64_t(bounded.size()) >= 4 * FEW_QUERIES) {
        std::vector<int64_t> some, others;
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
    if (step > seed_step) {
        // The first guess was rough. Where bounds pay for most queries, a better one may make them
        // pay for the others.
        if (full.size() < bounded.size()) {
            bounded.insert(bounded.end(), full.begin(), full.end());
            full.clear();
        }
        status = seed(p, bounded, seed_step, threads, &guess);
        if (status != Status::OK) return status;
        split(p, guess, seed_step, threads, &bounded, &full);
    }
    if (seed_step == 1) return Status::OK;
    // Where the proven θ is too low for bounds to pay, every tile makes another.
    const std::vector<double> proved(p.theta.begin(), p.theta.end());
    std::vector<int64_t> low;
    split(p, proved, 1, threads, &bounded, &low);
    status = seed(p, low, 1, threads, &guess);
    if (status != Status::OK) return status;
    bounded.insert(bounded.end(), low.begin(), low.end());
    return Status::OK;
}

}  // namespace

Panel panel_of(const Problem& p, const std::vector<int64_t>& which) {
    if (p.coded()) {
        std::vector<CodedQuery> coded;
        for (int64_t q : which) coded.push_back(p.codes[q]);
        return Panel(coded);
    }
    return Panel(p.some(which).queries, p.prefix());
}

bool many(const Problem& p) {
    constexpr int64_t MANY = 128;  // rows a neighbour: where there are fewer, each is scored
    constexpr int64_t FEW = 22;    // neighbours, of which a list is cheap whatever the rows
    return p.rows.eligible() <= MANY * std::max<int64_t>(p.k - FEW, 0) + 2 * p.k;
}

std::vector<double> split(Problem& p, const std::vector<double>& guess, int64_t step, int threads,
                          std::vector<int64_t>* which, std::vector<int64_t>* full) {
    std::vector<double> left(p.data.size());
    if (which->empty()) return left;
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
    for (int64_t i = 0; i < n; ++i) left[all[i]] = double(columns[i]) / double(sampled);
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
    return left;
}

Status make_plan(Problem& p, bool tiles, int threads, Plan* plan) {
    plan->bounded.resize(p.data.size());
    std::iota(plan->bounded.begin(), plan->bounded.end(), 0);
    plan->guess.assign(p.data.size(), -INFINITY);
    if (!p.prunes() || !tiles || many(p) || saves_little(p, 1.0)) {
        plan->full.swap(plan->bounded);
        return Status::OK;
    }
    // Where a mask thins rows out, more tiles are sampled, so that as many rows are.
    const double full_tiles = double(p.rows.eligible()) / TILE,
                 filled = full_tiles / TileReader::count(p.rows, p.source()),
                 most = p.laddered() ? LADDER_STEP : SAMPLE_STEP;
    const int64_t step = std::clamp<int64_t>(p.rows.eligible() / (8 * p.k + 4095), 1,
                                             std::max<int64_t>(1, int64_t(most * filled)));
    return (p.laddered() ? plan_ladder : plan_prefix)(p, step, threads, plan);
}

}  // namespace mrl
