#include "cpu/search/scan.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>

#include "cpu/threads.h"

namespace mrl {
namespace {

// Below this, starting a thread costs more than it brings.
constexpr double MULTIPLIES_A_THREAD = 2e6;

// Whether the best or the worst of sorted entries has a score that is infinite or NaN.
bool beyond_float(const Entry* sorted, int64_t count) {
    return count > 0 && !(std::isfinite(score_of(sorted[0].key)) &&
                          std::isfinite(score_of(sorted[count - 1].key)));
}

// The scales and terms that turn a tile's sums into a metric's scores.
class Scaling {
  public:
    Scaling(const Kernels& kernels, const Rows& rows, const Queries& queries,
            const FirstStage& stage, const std::vector<CodedQuery>& coded)
        : kernels_(kernels),
          ladder_(rows.ladder),
          metric_(terms_of(stage.metric)),
          source_(stage.source),
          place_(ladder_.place(stage.dim)),
          query_scale_(queries.n, 1.0f),
          factors_(queries.n * 2) {
        // Terms that depend on the query alone change no order and are left out.
        const float* centre = of_codes(source_) ? ladder_.centre : nullptr;
        const double square = centre ? kernels.dot64(centre, centre, stage.dim) : 0.0;
        for (int64_t q = 0; q < queries.n; ++q) {
            const float* query = queries.data + q * queries.stride;
            if (metric_.normalized) query_scale_[q] = query_scale(query, stage.dim);
            query_scale_[q] *= metric_.factor(source_);
            factors_[2 * q] = metric_.squares > 0.0f ? -metric_.squares : query_scale_[q];
            if (metric_.normalized && centre)
                factors_[2 * q + 1] =
                    float(query_scale_[q] * (kernels.dot64(query, centre, stage.dim) - square));
            if (of_codes(source_)) query_scale_[q] *= coded[q].scale;
        }
        std::fill(row_scale_, row_scale_ + TILE, 1.0f);
    }
    // Sets the scales and terms of the tile that was read last.
    void prepare(const TileReader& tiles, Scan* scan) {
        if (source_ == Source::SIGNS || source_ == Source::NIBBLES) {
            const int64_t dims = ladder_.dims.size(), first = SIGN_FACTOR + place_;
            if (source_ == Source::SIGNS) {
                scan->row_scale = whole(tiles.stat(first), scan->rows, row_scale_);
            } else {
                const float* scale = tiles.stat(CODE_SCALE);
                const float* inverse = tiles.stat(first + (metric_.normalized ? 2 * dims : 0));
                for (int r = 0; r < scan->rows; ++r)
                    row_scale_[r] = metric_.normalized ? scale[r] * inverse[r] : scale[r];
                scan->row_scale = row_scale_;
            }
            if (!ladder_.has_terms()) return;
            std::copy_n(tiles.stat(first + dims), scan->rows, terms_);
            if (metric_.normalized)
                std::copy_n(tiles.stat(first + 2 * dims), scan->rows, terms_ + TILE);
            scan->term_values = terms_;
        } else if (source_ == Source::CODES) {
            const float *scale = tiles.stat(CODE_SCALE), *norm = tiles.stat(PREFIX_NORM);
            for (int r = 0; r < scan->rows; ++r) {
                row_scale_[r] = scale[r];
                if (metric_.normalized) row_scale_[r] = norm[r] > 0 ? scale[r] / norm[r] : 0;
                terms_[r] = norm[r] * norm[r];  // ‖q‖² changes no order
            }
            scan->row_scale = row_scale_;
            if (metric_.squares > 0.0f) scan->term_values = terms_;
        } else if (metric_.normalized) {
            std::fill(sqnorm_, sqnorm_ + TILE, 0.0f);
            for (const Segment& segment : scan->segments) kernels_.sqnorms(segment, sqnorm_);
            for (int r = 0; r < TILE; ++r) row_scale_[r] = inverse_norm(sqnorm_[r]);
            scan->row_scale = row_scale_;
            scan->row_sqnorm = sqnorm_;
        } else if (metric_.factor(source_) != 1.0f) {
            scan->row_scale = row_scale_;  // ones
        }
    }
    void of_group(const Panel::Group& group, Scan* scan) {
        scan->query_scale = query_scale_.data() + group.first;
        scan->term_factors = of_group_;
        std::fill(of_group_, of_group_ + TERMS * MAX_GROUP, 0.0f);
        for (int64_t i = 0; i < group.size; ++i)
            for (int j = 0; j < 2; ++j)
                of_group_[j * group.size + i] = factors_[2 * (group.first + i) + j];
    }

  private:
    // Values [TILE]. A tile that is not full is copied: another thread may be writing the rest.
    static const float* whole(const float* values, int rows, float* copy) {
        return rows == TILE ? values : (std::copy_n(values, rows, copy), copy);
    }

    const Kernels& kernels_;
    const Ladder& ladder_;
    const MetricTerms metric_;
    const Source source_;
    const int64_t place_;                       // of the stage's dim among the ladder's
    std::vector<float> query_scale_, factors_;  // factors: [queries, 2], of the first two terms
    float row_scale_[TILE], sqnorm_[TILE], terms_[TERMS * TILE] = {}, of_group_[TERMS * MAX_GROUP];
};

// Scans tiles for all queries and keeps each one's best.
class Scanner {
  public:
    Scanner(const Run& run, const Rows& rows, const Queries& queries, const FirstStage& stage)
        : run_(run),
          rows_(rows),
          queries_(queries),
          stage_(stage),
          coded_(code_all(run.kernels, rows.ladder, queries, stage)),
          panel_(of_codes(stage.source) ? Panel(coded_) : Panel(queries, stage.dim)) {}

    // Appends to best[q] at least the `keep` best rows of tiles tile_at(0), ..., tile_at(tiles − 1)
    // that beat the query's gate. tile_at ascends. A sample keeps fewer rows than the stage does.
    // False if a value is not finite.
    template <class TileAt>
    bool run(int64_t tiles, const TileAt& tile_at, int64_t keep, const std::vector<float>& gates,
             std::vector<std::vector<Entry>>* best) const;

  private:
    static std::vector<CodedQuery> code_all(const Kernels& kernels, const Ladder& ladder,
                                            const Queries& queries, const FirstStage& stage) {
        std::vector<CodedQuery> coded;
        std::vector<float> less(stage.dim);
        const float* centre = stage.source == Source::CODES ? nullptr : ladder.centre;
        for (int64_t q = 0; q < queries.n && of_codes(stage.source); ++q) {
            centred(queries.data + q * queries.stride, centre, stage.dim, less.data());
            coded.push_back(code_query(kernels, stage.source, less.data(), stage.dim));
        }
        return coded;
    }
    const Run run_;
    const Rows& rows_;
    const Queries queries_;
    const FirstStage stage_;
    const std::vector<CodedQuery> coded_;
    const Panel panel_;
};

template <class TileAt>
bool Scanner::run(int64_t tiles, const TileAt& tile_at, int64_t keep,
                  const std::vector<float>& gates, std::vector<std::vector<Entry>>* best) const {
    const int threads =
        threads_for(double(tiles) * TILE * stage_.dim * (queries_.n + 1), run_.threads);
    // Many queries are divided among the threads, and each thread sees every row: its gates close
    // sooner than if it saw a part of them. With few queries, the rows are divided.
    const std::vector<Panel::Group>& groups = panel_.groups();
    const int64_t parts = int64_t(groups.size()) >= 2 * threads ? threads : 1;
    auto first_group = [&](int64_t part) { return part * int64_t(groups.size()) / parts; };
    auto first_query = [&](int64_t part) {
        return part < parts ? groups[first_group(part)].first : queries_.n;
    };
    std::atomic<bool> finite{true};
    std::mutex merging;
    std::deque<Ranges> ranges;
    for (int64_t part = 0; part < parts; ++part)
        ranges.emplace_back(tiles, std::clamp<int64_t>(tiles / (threads * 8), 1, 64));
    parallel(threads, [&](int thread) {
        const int64_t part = thread % parts, offset = first_query(part);
        Kept mine(gates.data() + offset, first_query(part + 1) - offset, keep, rows_.count());
        TileReader reader(run_.kernels, rows_, stage_.source, stage_.dim,
                          first_group(part + 1) - first_group(part));
        Scaling scaling(run_.kernels, rows_, queries_, stage_, coded_);
        Scan scan = {};
        for (int64_t i, last; ranges[part].next(&i, &last);) {
            for (; i < last; ++i) {
                poll();
                if (!reader.read(tile_at(i), &scan)) finite = false;
                scaling.prepare(reader, &scan);
                for (int64_t g = first_group(part); g < first_group(part + 1); ++g) {
                    const Panel::Group& group = groups[g];
                    panel_.put(group, &scan);
                    scaling.of_group(group, &scan);
                    scan.topk = mine.topks.data() + group.first - offset;
                    scan.thresholds = mine.thresholds.data() + group.first - offset;
                    run_.kernels.scan[int(stage_.source)][group.size - 1](scan);
                }
            }
        }
        std::unique_lock<std::mutex> lock(merging, std::defer_lock);
        if (parts == 1) lock.lock();
        for (int64_t q = offset; q < first_query(part + 1); ++q) {
            const TopK& topk = mine.topks[q - offset];
            (*best)[q].insert((*best)[q].end(), topk.entries, topk.entries + topk.count);
        }
    });
    return finite;
}

}  // namespace

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

Status scan_all(const Run& run, const Rows& rows, const Queries& queries, const FirstStage& stage,
                Entry* out, int64_t* counts) {
    constexpr int64_t SAMPLE = 8;  // every eighth tile
    const int64_t dim = stage.dim, keep = stage.keep, step = stage.step;
    const int threads = run.threads;
    const Scanner scanner(run, rows, queries, stage);
    const int64_t tiles = (TileReader::count(rows, stage.source) + step - 1) / step;
    const bool gathers = TileReader::gathers(rows, stage.source);
    std::vector<std::vector<Entry>> best(queries.n);
    std::vector<float> gates(queries.n, NAN);  // NaN: nothing is below it
    std::atomic<bool> overflow{false};
    auto every = [&](int64_t i) { return i * step; };
    bool finite;
    if (queries.n < MAX_GROUP || rows.eligible() < 16 * SAMPLE * keep * step) {
        finite = scanner.run(tiles, every, keep, gates, &best);
    } else {
        // A sample gates the rest. It holds about keep / SAMPLE of the `keep` best, hardly ever
        // `guess` of them, so rows below the sample's guess-th score are dropped.
        const double mean = double(keep) / SAMPLE;
        const int64_t guess = int64_t(mean + 4.0 * std::sqrt(mean) + 4.0);
        auto sampled = [&](int64_t i) { return (i * SAMPLE + SAMPLE - 1) * step; };
        auto others = [&](int64_t i) { return (i + i / (SAMPLE - 1)) * step; };
        finite = scanner.run(tiles / SAMPLE, sampled, guess, gates, &best);
        each(queries.n, threads, [&](int64_t q) {
            cut(best[q], guess);
            if (int64_t(best[q].size()) == guess) gates[q] = score_of(best[q].back().key);
        });
        finite &= scanner.run(tiles - tiles / SAMPLE, others, keep, gates, &best);
    }
    if (!finite) return Status::NOT_FINITE;
    std::vector<char> missed(queries.n, 0);
    auto finish = [&](int64_t q, const std::vector<Entry>& all) {
        counts[q] = all.size();
        std::copy(all.begin(), all.end(), out + q * keep);
        for (Entry* e = out + q * keep; gathers && e < out + q * keep + counts[q]; ++e)
            e->key = with_row(e->key, rows.gathered_rows[row_of(e->key)]);
        if (beyond_float(all.data(), counts[q])) overflow = true;
    };
    each(queries.n, threads, [&](int64_t q) {
        cut(best[q], keep);
        // Where fewer than `keep` rows beat the gate, it was too high: that query is scanned again.
        missed[q] = !std::isnan(gates[q]) &&
                    !(int64_t(best[q].size()) == keep && score_of(best[q].back().key) > gates[q]);
        if (!missed[q]) finish(q, best[q]);
    });
    std::vector<int64_t> again;
    std::vector<float> data;
    for (int64_t q = 0; q < queries.n; ++q) {
        if (!missed[q]) continue;
        const float* query = queries.data + q * queries.stride;
        again.push_back(q);
        data.insert(data.end(), query, query + dim);
    }
    if (!again.empty()) {
        const Queries part = {data.data(), int64_t(again.size()), dim};
        std::vector<std::vector<Entry>> found(again.size());
        Scanner(run, rows, part, stage)
            .run(tiles, every, keep, std::vector<float>(again.size(), NAN), &found);
        each(again.size(), threads, [&](int64_t i) {
            cut(found[i], keep);
            finish(again[i], found[i]);
        });
    }
    return overflow ? Status::OVERFLOW_ : Status::OK;
}

Status advance_all(const Kernels& kernels, const Rows& rows, const float* query,
                   const LaterStage& stage, std::vector<float>& tile,
                   std::vector<Entry>& candidates) {
    constexpr int64_t COLUMN_BLOCK = 256;  // columns a gathered tile advances by
    const int64_t from = stage.from, to = stage.to;
    const MetricTerms& terms = terms_of(stage.metric);
    const float scale =
        (terms.normalized ? query_scale(query, to) : 1.0f) * terms.factor(terms.source);
    const int64_t count = candidates.size();
    tile.resize(COLUMN_BLOCK * TILE);
    // Points to a column of each of the TILE candidates from `first` on; the last candidate stands
    // for those beyond the end.
    auto point = [&](int64_t first, int64_t column, const void** pointers) {
        for (int r = 0; r < TILE; ++r) {
            const int64_t row = row_of(candidates[std::min(first + r, count - 1)].key);
            const Span& span = span_of(rows, row);
            pointers[r] = suffix_at(rows, span, row - span.first, column);
        }
    };
    const void *pointers[2][TILE], **now = pointers[0], **next = pointers[1];
    float sums[TILE], sqnorm[TILE];
    if (count > 0) point(0, from, now);
    for (int64_t first = 0; first < count; first += TILE) {
        const int n = int(std::min<int64_t>(TILE, count - first));
        Entry* group = candidates.data() + first;
        std::fill(sums, sums + TILE, 0.0f);
        std::fill(sqnorm, sqnorm + TILE, 0.0f);
        for (int r = 0; r < n; ++r) {
            sums[r] = group[r].partial;
            sqnorm[r] = group[r].sqnorm;
        }
        for (int64_t column = from; column < to; column += COLUMN_BLOCK) {
            const Segment segment = {tile.data(), std::min(COLUMN_BLOCK, to - column)};
            const bool last = column + COLUMN_BLOCK >= to;
            point(last ? first + TILE : first, last ? from : column + COLUMN_BLOCK, next);
            if (!kernels.pack(now, next, rows.dtype, n, segment.cols, tile.data()))
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
    return beyond_float(candidates.data(), candidates.size()) ? Status::OVERFLOW_ : Status::OK;
}

}  // namespace mrl
