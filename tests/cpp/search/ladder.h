// Ladders of the tests, rows beside their centres, and what the arrays of codes hold.
#pragma once

#include "cpu/search/codes.h"
#include "vectors.h"

constexpr int64_t WIDTH = 83;  // no multiple of a step
inline const std::vector<int64_t> DIMS = {9, 32, WIDTH};

struct Frame {
    bool centred, rotated;
};
inline const Frame FRAMES[] = {{false, false}, {true, false}, {false, true}, {true, true}};

// A ladder of a metric, whose centre is a vector's length away or null.
struct Setup {
    Setup(Metric metric, Frame frame, std::mt19937& random) {
        for (int64_t c = 0; c < WIDTH; ++c) {
            centre.push_back(3.0f + uniform(random));
            signs.push_back(random() % 2 ? 1.0f : -1.0f);
        }
        ladder = {DIMS, frame.centred ? centre.data() : nullptr, metric,
                  frame.rotated ? signs.data() : nullptr};
    }
    std::vector<float> centre, signs;
    Ladder ladder;
    double of(int64_t c) const { return ladder.centre ? double(centre[c]) : 0.0; }

    // A vector in the form that is coded.
    std::vector<double> coded(const float* x) const {
        std::vector<double> y;
        for (int64_t c = 0; c < WIDTH; ++c) y.push_back(double(x[c]) - of(c));
        return turned(y);
    }
    // The same of a vector less the centre.
    std::vector<double> turned(std::vector<double> y) const {
        for (size_t i = 0; i < DIMS.size() && ladder.signs; ++i) turn(i, false, y.data());
        return y;
    }
    // The vector with this form.
    std::vector<float> vector_of(std::vector<double> y) const {
        for (size_t i = 0; i < DIMS.size() && ladder.signs; ++i) turn(i, true, y.data());
        std::vector<float> x;
        for (int64_t c = 0; c < WIDTH; ++c) x.push_back(float(y[c] + of(c)));
        return x;
    }

  private:
    // Rotates the columns before one of the dims, or back.
    void turn(size_t place, bool back, double* y) const {
        const int64_t from = place ? DIMS[place - 1] : 0, to = DIMS[place];
        int64_t cols = 1;
        while (2 * cols <= to - from) cols *= 2;
        const int64_t last = to - cols;
        multiply(back ? last : from, cols, back, y);
        if (last != from) multiply(back ? from : last, cols, back, y);
    }
    // Multiplies columns by the signs and the matrix of ±1/√n, by its definition; or divides.
    void multiply(int64_t from, int64_t cols, bool back, double* y) const {
        std::vector<double> turned(cols);
        for (int64_t i = 0; i < cols; ++i)
            for (int64_t j = 0; j < cols; ++j) {
                const double entry = __builtin_popcountll(i & j) % 2 ? -1.0 : 1.0;
                turned[i] += entry * signs[from + (back ? i : j)] * y[from + j] / std::sqrt(cols);
            }
        std::copy(turned.begin(), turned.end(), y + from);
    }
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
