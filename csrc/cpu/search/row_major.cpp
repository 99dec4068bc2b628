// Few queries: packing rows into tiles would cost more than the sums. Rows are summed row-major,
// columns in lanes, and the best are scored again in the canonical order. Two sums of a pair differ
// by their rounding at most, so that the list provably holds the best where its last entry is worse
// than the k-th by more.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "cpu/search/read_ahead.h"
#include "cpu/search/scanner.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

// Adding up a row's lanes costs a query as much as packing so many of its columns, in measurements.
constexpr int64_t COLUMNS_A_QUERY = 20, MOST_QUERIES = 32;

// How many rows are scored again; some more than are wanted, as sums may disagree on their order.
int64_t length_of(int64_t keep) { return keep + keep / 8 + 4; }

bool pays(const Rows& rows, const Queries& queries, const FirstStage& stage) {
    return !of_codes(stage.source) && stage.keep > 0 && queries.n <= MOST_QUERIES &&
           queries.n * COLUMNS_A_QUERY <= stage.dim - rows.packed_dim &&
           2 * queries.n * length_of(stage.keep) * stage.step <= rows.eligible();
}

// How far a score by one order of columns may be from that by another, where the larger of two is
// `score`.
double apart(const FirstStage& stage, double query_norm, double row_norm, double score) {
    const MetricTerms& terms = terms_of(stage.metric);
    const double margin = rounding(stage.dim);
    const double under = 2.0 * underflow(stage.dim);
    if (terms.source == Source::DIFFERENCE) return under + 10.0 * margin * std::abs(score);
    const double length = terms.normalized ? 3.0 : query_norm * row_norm;
    return under + 2.0 * terms.product * margin * length;
}

// Whether so many rows score alike that a list would decide few of the queries, by a sample of many
// rows: where lists decide nothing, rows are read twice.
bool seems_tied(const Scanner& scanner, const Queries& queries, const FirstStage& stage,
                const Kernels& kernels, int64_t tiles, int threads) {
    constexpr int64_t MANY_TILES = 512, STEP = 16;
    if (tiles < MANY_TILES) return false;
    const int64_t kth = stage.keep / STEP, last = length_of(stage.keep) / STEP + 8;
    std::vector<std::vector<Entry>> best(queries.n);
    const Seen seen = scanner.run(
        tiles / STEP, [&](int64_t i) { return i * STEP * stage.step; }, last + 1,
        std::vector<float>(queries.n, NAN), &best);
    std::atomic<int64_t> tied{0};
    each(queries.n, threads, [&](int64_t q) {
        const float* query = queries.data + q * queries.stride;
        const double norm = std::sqrt(kernels.dot64(query, query, stage.dim));
        cut(best[q], last + 1);
        if (int64_t(best[q].size()) <= last) return;
        const double low = score_of(best[q][last].key), high = score_of(best[q][kth].key);
        tied += low + apart(stage, norm, std::sqrt(seen.squares.greatest), low) >= high;
    });
    return 2 * tied > queries.n;
}

}  // namespace

std::vector<int64_t> scan_row_major(const Run& run, const Rows& rows, const Queries& queries,
                                    const FirstStage& stage, Entry* out, int64_t* counts) {
    std::vector<int64_t> open(queries.n);
    std::iota(open.begin(), open.end(), 0);
    if (!pays(rows, queries, stage)) return open;
    const int64_t dim = stage.dim, length = length_of(stage.keep);
    const int64_t tiles = (TileReader::count(rows, stage.source) + stage.step - 1) / stage.step;
    std::vector<std::vector<Entry>> best(queries.n);
    const Scanner scanner(run, rows, queries, stage, Reading::ROW_MAJOR);
    if (seems_tied(scanner, queries, stage, run.kernels, tiles, run.threads)) return open;
    const Seen seen = scanner.run(
        tiles, [&](int64_t i) { return i * stage.step; }, length,
        std::vector<float>(queries.n, NAN), &best);
    // Where norms divide, what underflows of a small one is no small share of it.
    const bool small = terms_of(stage.metric).normalized && seen.squares.least < SMALLEST;
    if (!seen.finite || !(seen.squares.greatest < LARGEST) || small) return open;
    std::vector<char> decided(queries.n, 0);
    each(queries.n, run.threads, [&](int64_t q) {
        const float* query = queries.data + q * queries.stride;
        const double norm = std::sqrt(run.kernels.dot64(query, query, dim));
        std::vector<Entry>& list = best[q];
        cut(list, length);
        if (int64_t(list.size()) < length || !ordinary(norm * norm)) return;
        const double last = score_of(list.back().key);
        if (TileReader::gathers(rows, stage.source))
            for (Entry& entry : list)
                entry.key = with_row(entry.key, rows.gathered_rows[row_of(entry.key)]);
        if (advance_all(run.kernels, rows, query,
                        {stage.metric, std::min(dim, rows.packed_dim), dim, stage.keep},
                        list) != Status::OK)
            return;
        decided[q] = last + apart(stage, norm, std::sqrt(seen.squares.greatest), last) <
                     score_of(list.back().key);
        if (!decided[q]) return;
        counts[q] = stage.keep;
        std::copy(list.begin(), list.end(), out + q * stage.keep);
    });
    open.clear();
    for (int64_t q = 0; q < queries.n; ++q)
        if (!decided[q]) open.push_back(q);
    return open;
}

void sum_listed(const Kernels& kernels, Source source, const float* query, DType dtype,
                int64_t cols, std::vector<RowColumns>* pointers, float* sums, float* squares) {
    constexpr size_t AHEAD = 4;  // rows
    const size_t count = pointers->size();
    if (count == 0) return;
    const RowColumns last = pointers->back();
    pointers->resize(count + AHEAD, last);
    kernels.row_sums[int(source)]({query, cols, 1, pointers->data(), pointers->data() + AHEAD,
                                   int(count), false, dtype, cols, sums, squares});
    pointers->resize(count);
}

void rank_row_major(const Kernels& kernels, const Rows& rows, const float* query, Metric metric,
                    Stage stage, std::vector<Entry>* candidates) {
    const MetricTerms& terms = terms_of(metric);
    const size_t count = candidates->size();
    std::vector<RowColumns> pointers;
    for (const Entry& entry : *candidates) {
        const int64_t row = row_of(entry.key);
        const Span& span = span_of(rows, row);
        pointers.push_back(suffix_at(rows, span, row - span.first, 0));
    }
    read_ahead(pointers, stage.dim * element_size(rows.dtype));
    std::vector<float> sums(count), squares(count);
    sum_listed(kernels, terms.source, query, rows.dtype, stage.dim, &pointers, sums.data(),
               squares.data());
    for (size_t i = 0; i < count; ++i) {
        const float scale = terms.normalized ? inverse_norm(squares[i]) : 1.0f;
        (*candidates)[i].key = make_key(sums[i] * scale, row_of((*candidates)[i].key));
    }
    cut(*candidates, stage.keep);
}

}  // namespace mrl
