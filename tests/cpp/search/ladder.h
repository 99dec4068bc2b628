// Ladders of the tests, rows beside their centres, and what the arrays of codes hold.
#pragma once

#include "cpu/search/codes.h"
#include "vectors.h"

constexpr int64_t WIDTH = 83;  // no multiple of a step
inline const std::vector<int64_t> DIMS = {9, 32, WIDTH};

// A ladder of a metric, whose centre is a vector's length away or null.
struct Setup {
    Setup(Metric metric, bool centred, std::mt19937& random) {
        for (int64_t c = 0; c < WIDTH; ++c) centre.push_back(3.0f + uniform(random));
        ladder = {DIMS, centred ? centre.data() : nullptr, metric};
    }
    std::vector<float> centre;
    Ladder ladder;
    double of(int64_t c) const { return ladder.centre ? double(centre[c]) : 0.0; }
};

inline Table rows_beside(const Setup& setup, int64_t n, std::mt19937& random) {
    Table table = make_table(n, WIDTH, DType::F32, random);
    for (int64_t row = 0; row < n; ++row)
        for (int64_t c = 0; c < WIDTH; ++c)
            table.set(row, c, table.row(row)[c] + float(setup.of(c)));
    return table;
}

struct Code {
    bool sign;
    int nibble, low;
};
inline Code code_of(const Database::Block& block, int64_t row, int64_t c) {
    const int64_t steps = code_steps(Source::NIBBLES, WIDTH),
                  at = (row / TILE * steps + c / 8) * TILE + row % TILE, byte = 4 * at + c % 4;
    const int64_t bytes = low_bytes(WIDTH);
    const int half = c % 8 < 4 ? 0 : 4, low_half = c < bytes ? 0 : 4;
    return {bool(block.signs[at] >> c % 8 & 1), block.nibbles[byte] >> half & 15,
            block.lows[row * bytes + c % bytes] >> low_half & 15};
}
