// Some of a database's rows, and their live mask.
#pragma once

#include "cpu/search/scan.h"
#include "vectors.h"

class Chosen {
  public:
    Chosen(const Rows& all, std::vector<int64_t> which) : rows(std::move(which)) {
        std::sort(rows.begin(), rows.end());
        auto row = rows.begin();
        for (const Span& span : all.spans) {
            const size_t before = words.size();
            words.resize(before + span.tiles());
            for (; row != rows.end() && *row < span.first + span.rows; ++row) {
                const int64_t local = *row - span.first;
                words[before + local / TILE] |= uint64_t(1) << local % TILE;
            }
        }
        words.shrink_to_fit();
    }
    bool has(int64_t row) const { return std::binary_search(rows.begin(), rows.end(), row); }

    std::vector<int64_t> rows;    // ascending
    std::vector<uint64_t> words;  // [tiles of the spans]
};

inline std::vector<int64_t> some_rows(int64_t n, int64_t count, std::mt19937& random) {
    std::vector<int64_t> rows = all_rows(n);
    std::shuffle(rows.begin(), rows.end(), random);
    rows.resize(count);
    return rows;
}

// The largest number of rows that scans gather: of more, they read the tiles.
inline int64_t most_gathered(const Rows& all) {
    int64_t few = 0, many = all.count() + 1;
    while (many - few > 1) {
        const int64_t count = (few + many) / 2;
        const Chosen first(all, all_rows(count));
        const Rows rows = all.restricted(first.words.data());
        (TileReader::gathers(rows, Source::PRODUCT) ? few : many) = count;
    }
    return few;
}

struct NamedRows {
    std::string name;
    std::vector<int64_t> rows;
};

// Rows of every density, with the two densities between which scans begin to read tiles.
inline std::vector<NamedRows> densities(const Rows& all, std::mt19937& random) {
    const int64_t n = all.count(), few = most_gathered(all);
    std::vector<NamedRows> out = {{"the first row", {0}}, {"the last row", {n - 1}}};
    std::vector<int64_t> counts = {0,           n / 1000, n / 100, few,          few + 1,
                                   n * 3 / 100, n / 25,   n / 2,   n * 99 / 100, n};
    for (int64_t count : counts) {
        if (count > n) continue;
        out.push_back({std::to_string(count) + " rows", some_rows(n, count, random)});
    }
    NamedRows run = {"a run of rows", {}};
    for (int64_t row = n / 4; row < n / 4 + n / 3; ++row) run.rows.push_back(row);
    out.push_back(run);
    return out;
}

// A database restricted to these rows, after it was restricted to these and some others.
class Filtered {
  public:
    Filtered(const Rows& all, const std::vector<int64_t>& which, std::mt19937& random)
        : chosen(all, which) {
        std::vector<int64_t> live = which;
        for (int64_t row = 0; row < all.count(); ++row)
            if (!chosen.has(row) && random() % 4) live.push_back(row);
        Chosen first(all, live);
        const Rows before = all.restricted(first.words.data());
        CHECK_EQUAL(before.eligible(), int64_t(live.size()));
        rows = before.restricted(chosen.words.data());
        CHECK_EQUAL(rows.eligible(), int64_t(which.size()));
        CHECK_EQUAL(rows.count(), all.count());
    }
    Chosen chosen;
    Rows rows;
};
