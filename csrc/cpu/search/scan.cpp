#include "cpu/search/scan.h"

#include <algorithm>
#include <cstring>

#include "cpu/search/read_ahead.h"
#include "cpu/search/scanner.h"
#include "cpu/threads.h"

namespace mrl {
namespace {

// Below this, starting a thread costs more than it brings.
constexpr double MULTIPLIES_A_THREAD = 2e6;

}  // namespace

bool beyond_float(const std::vector<Entry>& sorted) {
    return !sorted.empty() && !(std::isfinite(score_of(sorted.front().key)) &&
                                std::isfinite(score_of(sorted.back().key)));
}

// Moves the k best of more to the front, in any order.
static void select(Entry* entries, int64_t count, int64_t k) {
    constexpr int64_t FEW = 256;  // bisecting scores costs less than moving entries about
    if (count <= FEW) {
        int32_t ordered[FEW], low = INT32_MAX, high = INT32_MIN;  // as the scores are
        for (int64_t i = 0; i < count; ++i) {
            ordered[i] = int32_t(uint32_t(entries[i].key >> 32) ^ 0x80000000u);
            low = std::min(low, ordered[i]);
            high = std::max(high, ordered[i]);
        }
        while (low < high) {  // at least k scores are `low` or more, fewer than k beyond `high`
            const int32_t middle = int32_t((int64_t(low) + high + 1) >> 1);
            int32_t above = 0;
            for (int64_t i = 0; i < count; ++i) above += ordered[i] >= middle;
            if (above == k) {
                for (int64_t i = 0, to = 0; to < k; ++i)
                    if (ordered[i] >= middle) entries[to++] = entries[i];
                return;
            }
            if (above > k)
                low = middle;
            else
                high = middle - 1;
        }
    }
    std::nth_element(entries, entries + k - 1, entries + count, better);
}

void cut(std::vector<Entry>& entries, int64_t keep) {
    if (keep < int64_t(entries.size())) {
        if (keep > 0) select(entries.data(), entries.size(), keep);
        entries.resize(keep);
    }
    std::sort(entries.begin(), entries.end(), better);
}

// Room for entries beyond the k best: more room makes cuts rarer, less closes the gate sooner.
static int64_t spare(int64_t k) { return std::max<int64_t>(k, 54); }

Kept::Kept(const float* gates, int64_t queries, int64_t k, int64_t rows)
    : thresholds(gates, gates + queries), topks(queries) {
    const int64_t capacity = std::min(rows, std::min(k, rows) + spare(k)) + 1;
    entries.reset(new Entry[queries * capacity]);
    for (int64_t q = 0; q < queries; ++q)
        topks[q] = {entries.get() + q * capacity, 0, capacity, std::min(k, rows)};
}

float score_of(uint64_t key) {
    const uint32_t ordered = uint32_t(key >> 32);
    const uint32_t bits = ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered;
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

float query_scale(const float* query, int64_t dim) {
    float sum = 0.0f;
    for (int64_t c = 0; c < dim; ++c) sum += query[c] * query[c];
    return inverse_norm(sum);
}

int threads_for(double multiplies, int threads) {
    return int(std::max(1.0, std::min(double(threads), multiplies / MULTIPLIES_A_THREAD)));
}

float shrink(TopK& topk) {
    select(topk.entries, topk.count, topk.k);
    topk.count = topk.k;
    const auto worse = [](const Entry& a, const Entry& b) { return a.key < b.key; };
    return score_of(std::min_element(topk.entries, topk.entries + topk.k, worse)->key);
}

// As scan_all, from columns packed into tiles, or codes.
static Status scan_packed(const Run& run, const Rows& rows, const Queries& queries,
                          const FirstStage& stage, Entry* out, int64_t* counts) {
    constexpr int64_t SAMPLE = 8;  // every eighth tile
    const int64_t dim = stage.dim, keep = stage.keep, step = stage.step;
    const int threads = run.threads;
    const Scanner scanner(run, rows, queries, stage, Reading::PACKED);
    const int64_t tiles = (TileReader::count(rows, stage.source) + step - 1) / step;
    const bool gathers = TileReader::gathers(rows, stage.source);
    std::vector<std::vector<Entry>> best(queries.n);
    std::vector<float> gates(queries.n, NAN);  // NaN: nothing is below it
    std::atomic<bool> overflow{false};
    auto every = [&](int64_t i) { return i * step; };
    bool finite;
    if (queries.n < MAX_GROUP || rows.eligible() < 16 * SAMPLE * keep * step) {
        finite = scanner.run(tiles, every, keep, gates, &best).finite;
    } else {
        // A sample gates the rest. It holds about keep / SAMPLE of the `keep` best, hardly ever
        // `guess` of them, so rows below the sample's guess-th score are dropped.
        const double mean = double(keep) / SAMPLE;
        const int64_t guess = int64_t(mean + 4.0 * std::sqrt(mean) + 4.0);
        auto sampled = [&](int64_t i) { return (i * SAMPLE + SAMPLE - 1) * step; };
        auto others = [&](int64_t i) { return (i + i / (SAMPLE - 1)) * step; };
        finite = scanner.run(tiles / SAMPLE, sampled, guess, gates, &best).finite;
        each(queries.n, threads, [&](int64_t q) {
            cut(best[q], guess);
            if (int64_t(best[q].size()) == guess) gates[q] = score_of(best[q].back().key);
        });
        finite &= scanner.run(tiles - tiles / SAMPLE, others, keep, gates, &best).finite;
    }
    if (!finite) return Status::NOT_FINITE;
    std::vector<char> missed(queries.n, 0);
    auto finish = [&](int64_t q, const std::vector<Entry>& all) {
        counts[q] = all.size();
        std::copy(all.begin(), all.end(), out + q * keep);
        for (Entry* e = out + q * keep; gathers && e < out + q * keep + counts[q]; ++e)
            e->key = with_row(e->key, rows.gathered_rows[row_of(e->key)]);
        if (beyond_float(all)) overflow = true;
    };
    each(queries.n, threads, [&](int64_t q) {
        cut(best[q], keep);
        // Where fewer than `keep` rows beat the gate, it was too high: that query is scanned again.
        missed[q] = !std::isnan(gates[q]) &&
                    !(int64_t(best[q].size()) == keep && score_of(best[q].back().key) > gates[q]);
        if (!missed[q]) finish(q, best[q]);
    });
    std::vector<int64_t> again;
    for (int64_t q = 0; q < queries.n; ++q)
        if (missed[q]) again.push_back(q);
    if (!again.empty()) {
        const Gathered part(again, dim, queries);
        std::vector<std::vector<Entry>> found(again.size());
        Scanner(run, rows, part.queries, stage, Reading::PACKED)
            .run(tiles, every, keep, std::vector<float>(again.size(), NAN), &found);
        each(again.size(), threads, [&](int64_t i) {
            cut(found[i], keep);
            finish(again[i], found[i]);
        });
    }
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

Status scan_all(const Run& run, const Rows& rows, const Queries& queries, const FirstStage& stage,
                Entry* out, int64_t* counts) {
    const std::vector<int64_t> open = scan_row_major(run, rows, queries, stage, out, counts);
    if (int64_t(open.size()) == queries.n)
        return scan_packed(run, rows, queries, stage, out, counts);
    if (open.empty()) return Status::OK;
    const Gathered part(open, stage.dim, queries);
    const std::unique_ptr<Entry[]> entries(new Entry[open.size() * stage.keep]);
    std::vector<int64_t> found(open.size());
    const Status status = scan_packed(run, rows, part.queries, stage, entries.get(), found.data());
    for (size_t i = 0; i < open.size(); ++i) {
        counts[open[i]] = found[i];
        std::copy_n(entries.get() + i * stage.keep, found[i], out + open[i] * stage.keep);
    }
    return status;
}

void columns_of(const Kernels& kernels, const Rows& rows, int64_t row, int64_t dim, float* x) {
    const Span& span = span_of(rows, row);
    const int64_t local = row - span.first, head = std::min(rows.packed_dim, dim);
    const float* tile = span.packed + local / TILE * rows.packed_dim * TILE + local % TILE;
    for (int64_t c = 0; c < head; ++c) x[c] = tile[c * TILE];
    if (dim > head)
        kernels.widen_row(suffix_at(rows, span, local, head), rows.dtype, dim - head, x + head);
}

Status advance_all(const Kernels& kernels, const Rows& rows, const float* query,
                   const LaterStage& stage, std::vector<Entry>& candidates) {
    constexpr int64_t COLUMN_BLOCK = 256;  // columns a gathered tile advances by
    constexpr int64_t AHEAD = 1024;        // rows that are read ahead at once: whole tiles
    const int64_t to = stage.to, head = stage.from == 0 ? std::min(rows.packed_dim, to) : 0,
                  from = stage.from + head;  // columns [0, head) come from tiles
    const MetricTerms& terms = terms_of(stage.metric);
    const float scale =
        (terms.normalized ? query_scale(query, to) : 1.0f) * terms.factor(terms.source);
    const int64_t count = candidates.size();
    const std::unique_ptr<float[]> tile(new float[std::min(COLUMN_BLOCK, to - from) * TILE]);
    std::vector<float> packed(head * TILE);
    const auto gather = [&](int64_t first) {
        for (int r = 0; r < TILE; ++r) {
            const int64_t row = row_of(candidates[std::min(first + r, count - 1)].key);
            const Span& span = span_of(rows, row);
            const int64_t local = row - span.first;
            const float* lane = span.packed + local / TILE * rows.packed_dim * TILE + local % TILE;
            for (int64_t c = 0; c < head; ++c) packed[c * TILE + r] = lane[c * TILE];
        }
    };
    // Points to a column of each of the TILE candidates from `first` on; the last candidate stands
    // for those beyond the end.
    auto point = [&](int64_t first, int64_t column, RowColumns* pointers) {
        for (int r = 0; r < TILE; ++r) {
            const int64_t row = row_of(candidates[std::min(first + r, count - 1)].key);
            const Span& span = span_of(rows, row);
            pointers[r] = suffix_at(rows, span, row - span.first, column);
        }
    };
    const auto ahead = [&](int64_t first) {
        read_ahead(rows, std::min(AHEAD, count - first), from, to,
                   [&](int64_t i) { return row_of(candidates[first + i].key); });
    };
    RowColumns pointers[2][TILE], *now = pointers[0], *next = pointers[1];
    float sums[TILE], sqnorm[TILE];
    if (count > 0) point(0, from, now);
    for (int64_t first = 0; first < count; first += TILE) {
        const int n = int(std::min<int64_t>(TILE, count - first));
        Entry* group = candidates.data() + first;
        if (first % AHEAD == 0) ahead(first);
        std::fill(sums, sums + TILE, 0.0f);
        std::fill(sqnorm, sqnorm + TILE, 0.0f);
        for (int r = 0; r < n; ++r) {
            sums[r] = group[r].partial;
            sqnorm[r] = group[r].sqnorm;
        }
        if (head > 0) {
            const Segment segment = {packed.data(), head};
            gather(first);
            kernels.advance(terms.source, segment, query, sums);
            if (terms.normalized) kernels.sqnorms(segment, sqnorm);
        }
        for (int64_t column = from; column < to; column += COLUMN_BLOCK) {
            const Segment segment = {tile.get(), std::min(COLUMN_BLOCK, to - column)};
            const bool last = column + COLUMN_BLOCK >= to;
            point(last ? first + TILE : first, last ? from : column + COLUMN_BLOCK, next);
            if (!kernels.pack(now, next, rows.dtype, n, segment.cols, tile.get()))
                return Status::NOT_FINITE;
            kernels.advance(terms.source, segment, query + column, sums);
            if (terms.normalized) kernels.sqnorms(segment, sqnorm);
            std::swap(now, next);
        }
        for (int r = 0; r < n; ++r) {
            const float row_scale = terms.normalized ? inverse_norm(sqnorm[r]) : 1.0f;
            group[r] = {make_key(sums[r] * (row_scale * scale), row_of(group[r].key)), sums[r],
                        sqnorm[r]};
        }
    }
    cut(candidates, stage.keep);
    return beyond_float(candidates) ? Status::OVERFLOW_ : Status::OK;
}

}  // namespace mrl
