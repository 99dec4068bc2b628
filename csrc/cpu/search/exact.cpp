// Certified exact search: rows that provably cannot be among the k best are dropped level by level,
// the few others are scored in fp64. θ is near its end from the start: it is that of what the
// prefix finds. Where a sample says that bounds will not pay for a query, all its rows are scored
// in fp32, and in fp64 where that is too close to tell.
#include <algorithm>
#include <mutex>
#include <numeric>

#include "cpu/search/bounds.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

constexpr int64_t SAMPLE_STEP = 16;  // every 16th tile makes a guess at θ
constexpr int64_t SEED_STEP = 2;  // every second makes a first real one; every tile where codes do
constexpr int64_t PREDICT_TILES = 48;  // predict what bounds leave
constexpr int64_t PANEL_BYTES = 512 << 10, PASS_BYTES = int64_t(256) << 20;  // of one pass

// Queries side by side in memory.
struct Gathered {
    Gathered(const Problem& p, const std::vector<int64_t>& which) {
        for (int64_t q : which) data.insert(data.end(), p.data[q], p.data[q] + p.dim);
        queries = {data.data(), int64_t(which.size()), p.dim};
    }
    std::vector<float> data;
    Queries queries;
};

Panel panel_of(const Problem& p, const std::vector<int64_t>& which) {
    if (p.rows.code_dim) {
        std::vector<Codes> coded;
        for (int64_t q : which) coded.push_back(p.codes[q]);
        return Panel(p.kernels, coded);
    }
    return Panel(Gathered(p, which).queries, p.prefix());
}

// Reranks what looks best by the prefix among every step-th tile and raises θ to the k-th best fp64
// score of these rows; also a guess at the θ of all rows, whose k best are k / step of these.
Status seed(Problem& p, const std::vector<int64_t>& which, int64_t step, int threads,
            std::vector<double>* guess) {
    const int64_t n = which.size();
    if (n == 0) return Status::OK;
    const Gathered gathered(p, which);
    const Source source = p.rows.code_dim ? Source::CODES : p.terms.source;
    const int64_t dim = p.prefix(), keep = std::min(2 * p.k + 32, p.rows.eligible());
    std::unique_ptr<Entry[]> entries(new Entry[n * keep + 1]);
    std::vector<int64_t> counts(n);
    Status status = scan_all(p.kernels, p.rows, gathered.queries, p.metric, source, dim, keep, step,
                             threads, entries.get(), counts.data());
    if (status != Status::OK) return status;
    each(n, threads, [&](int64_t i) {
        const int64_t q = which[i];
        const Entry* mine = entries.get() + i * keep;
        std::vector<Entry> candidates(mine, mine + counts[i]);
        std::vector<float> room;
        if (source == Source::CODES)
            for (Entry& entry : candidates) entry.partial = entry.sqnorm = 0.0f;
        // An overflow shows again in the scores of the end.
        advance_all(p.kernels, p.rows, p.data[q], p.metric, source == Source::CODES ? 0 : dim,
                    p.dim, p.k, room, candidates);
        std::vector<double> scores;
        for (const Entry& entry : candidates)
            scores.push_back(p.score(q, row_of(entry.key), &room));
        std::sort(scores.rbegin(), scores.rend());
        const int64_t rank = (p.k + step - 1) / step;
        if (rank <= int64_t(scores.size())) (*guess)[q] = scores[rank - 1];
        if (int64_t(scores.size()) == p.k) raise(p.theta[q], scores.back());
    });
    return Status::OK;
}

// Bounds every row of some of the queries; appends each thread's best to theirs.
bool run(Problem& p, const std::vector<int64_t>& which, int threads,
         std::vector<std::vector<Final>>* best) {
    if (which.empty()) return true;
    const Panel panel = panel_of(p, which);
    const int64_t tiles = TileReader::count(p.rows, p.source());
    threads = threads_for(double(tiles) * TILE * p.prefix() * which.size(), threads);
    std::atomic<bool> finite{true};
    Ranges ranges((tiles + CHUNK_TILES - 1) / CHUNK_TILES, 1);
    std::mutex merging;
    parallel(threads, [&](int) {
        Pass pass(p, which, panel);
        for (int64_t at, last; ranges.next(&at, &last);)
            if (!pass.run(at * CHUNK_TILES, std::min(last * CHUNK_TILES, tiles), nullptr))
                finite = false;
        const std::lock_guard<std::mutex> lock(merging);
        for (size_t i = 0; i < which.size(); ++i) {
            std::vector<Final>& all = (*best)[which[i]];
            all.insert(all.end(), pass.heaps[i].begin(), pass.heaps[i].end());
        }
    });
    return finite;
}

// The least and the greatest norm of a row that is not 0.
std::pair<double, double> norms(const Rows& rows) {
    float least = INFINITY, greatest = 0.0f;
    auto see = [&](const Span& span, int64_t row) {
        const float* stats = span.stats + row;
        const float tail = rows.levels.empty() ? 0.0f : stats[TAIL_NORM * span.stats_stride],
                    norm = stats[PREFIX_NORM * span.stats_stride] + tail;  // within a factor √2
        greatest = std::max(greatest, norm);
        if (norm > 0.0f) least = std::min(least, norm);
    };
    if (rows.gathered_rows.empty())
        for (const Span& span : rows.spans)
            for (int64_t row = 0; row < span.rows; ++row) see(span, row);
    for (int64_t row : rows.gathered_rows) {
        const Span& span = span_of(rows, row);
        see(span, row - span.first);
    }
    return {least * 0.7, greatest};
}

// Scores every row in fp32 and, of the best, in fp64 those that may be among the k best. A query
// where the others may be so too, because very many rows score alike, goes to `undecided`.
Status scan_fully(Problem& p, const Rows& rows, const std::vector<int64_t>& which, int threads,
                  std::vector<int64_t>* undecided, std::vector<std::vector<Final>>* best) {
    if (which.empty()) return Status::OK;
    const Gathered gathered(p, which);
    const Source source = p.terms.source;
    const int64_t n = which.size(), count = p.rows.eligible(), keep = std::min(2 * p.k + 32, count);
    std::unique_ptr<Entry[]> entries(new Entry[n * keep + 1]);
    std::vector<int64_t> counts(n);
    const Status status = scan_all(p.kernels, rows, gathered.queries, p.metric, source, p.dim, keep,
                                   1, threads, entries.get(), counts.data());
    if (status != Status::OK) return status;
    const auto [least, greatest] = norms(rows);
    std::vector<char> open(n, 0);
    each(n, threads, [&, least = least, greatest = greatest](int64_t i) {
        const int64_t q = which[i];
        const Entry* mine = entries.get() + i * keep;
        // The most by which a fp64 score can differ from this one.
        auto error = [&](double score) {
            if (p.terms.source == Source::DIFFERENCE)
                return 4.0 * p.margin * std::abs(score) + 1e-36;
            if (p.terms.normalized) return 3.0 * p.margin;
            return p.margin * p.norm[q] * greatest + 1e-36;
        };
        const double kth = score_of(mine[p.k - 1].key);
        const double last = score_of(mine[keep - 1].key);
        p.touched[q] = count;
        std::vector<float> room;
        std::vector<Final>& all = (*best)[q];
        for (int64_t e = 0; e < keep; ++e) {
            const double score = score_of(mine[e].key);
            if (score + error(score) < kth - error(kth)) break;
            all.push_back({p.score(q, row_of(mine[e].key), &room), row_of(mine[e].key)});
        }
        const bool plain = ordinary(p.norm[q] * p.norm[q]) && greatest * greatest < LARGEST &&
                           (least * least > SMALLEST || least > greatest);
        open[i] = keep < count && !(plain && last + error(last) < kth - error(kth));
        if (!open[i]) return;
        all.clear();
        if (plain) raise(p.theta[q], kth - error(kth));
    });
    for (int64_t i = 0; i < n; ++i)
        if (open[i]) undecided->push_back(which[i]);
    return Status::OK;
}

// Leaves in `which` the queries for which bounds cost less than reading every row does, by a sample
// of the rows and a guess at each θ, and moves the others to `full`.
void split(Problem& p, const std::vector<double>& guess, int threads, std::vector<int64_t>* which,
           std::vector<int64_t>* full) {
    if (which->empty()) return;
    const std::vector<int64_t> all = *which;
    const int64_t n = all.size();
    const Panel panel = panel_of(p, all);
    const int64_t tiles = TileReader::count(p.rows, p.source()),
                  sampled = std::min(tiles, PREDICT_TILES);
    // In columns: what a scan of the rows costs, less that of the prefix, of a quarter of the bytes
    // where it is of codes.
    const double row = double(p.rows.eligible()) / tiles * p.dim,
                 tile = double(TILE) * p.prefix() / (p.rows.code_dim ? 4 : 1);
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
        for (int64_t at, last; ranges.next(&at, &last);)
            pass.run(at * tiles / sampled, at * tiles / sampled + 1, &trial);
        for (int64_t i = 0; i < n; ++i) columns[i] += pass.columns_read[i];
    });
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
    if (!p.prunes() || !rows.gathered_rows.empty() || 4 * p.k >= rows.eligible()) {
        full.swap(bounded);
    } else {
        // Of rows that a mask thins out as many are sampled.
        const double full_tiles = double(rows.eligible()) / TILE,
                     filled = full_tiles / TileReader::count(p.rows, p.source());
        const int64_t step =
            std::clamp<int64_t>(rows.eligible() / (8 * p.k + 4095), 1,
                                std::max<int64_t>(1, int64_t(SAMPLE_STEP * filled)));
        std::vector<double> guess(bounded.size(), -INFINITY);
        Status status = seed(p, bounded, step, threads, &guess);
        if (status != Status::OK) return status;
        split(p, guess, threads, &bounded, &full);
        const int64_t seed_step = p.rows.code_dim ? 1 : SEED_STEP;
        if (step > seed_step) {
            // The first guess was a rough one: where it serves most, it may be what the others
            // lack.
            if (full.size() < bounded.size()) {
                bounded.insert(bounded.end(), full.begin(), full.end());
                full.clear();
            }
            status = seed(p, bounded, seed_step, threads, &guess);
            if (status != Status::OK) return status;
            split(p, guess, threads, &bounded, &full);
        }
        if (seed_step > 1) {
            // What the guess promises, the θ that is proved so far may be too low to keep.
            std::vector<double> proved(p.theta.begin(), p.theta.end());
            std::vector<int64_t> low;
            split(p, proved, threads, &bounded, &low);
            status = seed(p, low, 1, threads, &guess);
            if (status != Status::OK) return status;
            bounded.insert(bounded.end(), low.begin(), low.end());
        }
    }
    if (!full.empty() && 8 * rows.eligible() < 7 * rows.count()) rows.gather();
    const Status status = scan_fully(p, rows, full, threads, &bounded, best);
    if (status != Status::OK) return status;
    return run(p, bounded, threads, best) ? Status::OK : Status::NOT_FINITE;
}

}  // namespace

Status exact_search(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
                    int64_t dim, int64_t k, int threads, float* scores, int64_t* ids,
                    int64_t* touched) {
    rows.check();
    if (!finite(queries, dim)) return Status::QUERY_NOT_FINITE;
    std::atomic<bool> overflow{false};
    Rows in_place = rows, gathered = rows;
    in_place.gathered_rows.clear();
    const int64_t keep = std::max<int64_t>(std::min(k, rows.eligible()), 1);
    const int64_t pass = std::clamp<int64_t>(
        PASS_BYTES / int64_t(sizeof(Final) * threads * keep + sizeof(Entry) * CHUNK_TILES * TILE),
        1, std::clamp<int64_t>(PANEL_BYTES / (4 * dim), 96, 256));
    for (int64_t begin = 0; begin < queries.n; begin += pass) {
        const int64_t n = std::min(pass, queries.n - begin);
        const Queries part = {queries.data + begin * queries.stride, n, queries.stride};
        std::vector<std::vector<Final>> best(n);
        std::unique_ptr<Problem> problem(new Problem(kernels, in_place, part, metric, dim, keep));
        if (rows.eligible() > 0) {
            const Status status = search_pass(*problem, gathered, threads, &best);
            if (status != Status::OK) return status;
        }
        each(n, threads, [&](int64_t q) {
            std::sort(best[q].begin(), best[q].end());
            best[q].resize(std::min<size_t>(best[q].size(), k));
            for (int64_t i = 0; i < k; ++i) {
                const bool found = i < int64_t(best[q].size());
                const int64_t at = (begin + q) * k + i;
                scores[at] = found ? float(best[q][i].score) : -INFINITY;
                ids[at] = found ? id_of(rows, best[q][i].row) : -1;
                if (found && std::isinf(scores[at])) overflow = true;
            }
            touched[begin + q] = std::min<int64_t>(problem->touched[q], rows.eligible());
        });
    }
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

Status range_search(const Kernels& kernels, const Rows& rows, const Queries& queries, Metric metric,
                    int64_t dim, double threshold, int threads,
                    std::vector<std::vector<Neighbour>>* found) {
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
            new Problem(kernels, in_place, part, metric, dim, rows.count() + 1));
        // Some scores a little below round to the threshold.
        const double theta = threshold - 1e-7 * std::abs(threshold) - 1e-36;
        for (std::atomic<double>& each_theta : problem->theta) each_theta = theta;
        std::vector<int64_t> all(n);
        std::iota(all.begin(), all.end(), 0);
        std::vector<std::vector<Final>> best(n);
        if (!run(*problem, all, threads, &best)) return Status::NOT_FINITE;
        each(n, threads, [&](int64_t q) {
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
