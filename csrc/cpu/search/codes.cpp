#include "cpu/search/codes.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace mrl {
namespace {

// Writes four codes of a query as a kernel reads them: see Kernels::quad_bytes.
void put_quad(const int8_t* codes, int64_t bytes, char* quad) {
    const int16_t wide[4] = {codes[0], codes[2], codes[1], codes[3]};
    if (bytes == 4)
        std::memcpy(quad, codes, 4);
    else
        std::memcpy(quad, wide, 8);
}

// Tables of the sums ±q over four columns each, in a unit such that every entry fits 6 bits and the
// sum of one entry of each table fits 16.
CodedQuery signs_of(const float* x, int64_t dim) {
    const int64_t steps = code_steps(Source::SIGNS, dim), tables = 2 * steps;
    const double most = std::min<double>(63, 65535 / tables);
    double largest = 0.0, total = 0.0;
    auto at = [&](int64_t c) { return c < dim ? double(x[c]) : 0.0; };
    auto reach = [&](int64_t t) {  // the greatest sum of a table; the least is its negative
        double sum = 0.0;
        for (int64_t j = 0; j < 4; ++j) sum += std::abs(at(4 * t + j));
        return sum;
    };
    for (int64_t t = 0; t < tables; ++t) {
        largest = std::max(largest, reach(t));
        total += reach(t);
    }
    const double unit = largest > 0.0 ? 2.0 * largest / most : 1.0;
    CodedQuery query = {std::vector<char>(steps * SIGN_TABLES),
                        SIGN_TABLES,
                        0,
                        float(-total / unit),
                        float(unit),
                        0.0,
                        {}};
    for (int64_t t = 0; t < tables; ++t)
        for (int64_t mask = 0; mask < 16; ++mask) {
            double sum = reach(t);
            for (int64_t j = 0; j < 4; ++j) sum += mask >> j & 1 ? at(4 * t + j) : -at(4 * t + j);
            query.steps[t * 16 + mask] = char(std::lrint(std::min(sum / unit, most)));
        }
    return query;
}

// Multiplies columns by signs and the normalised Hadamard matrix; there are a power of two.
void transform(const float* signs, int64_t cols, float* y) {
    const float scale = float(1.0 / std::sqrt(double(cols)));
    for (int64_t c = 0; c < cols; ++c) y[c] *= signs[c] * scale;
    for (int64_t half = 1; half < cols; half *= 2)
        for (int64_t first = 0; first < cols; first += 2 * half)
            for (int64_t c = first; c < first + half; ++c) {
                const float one = y[c], other = y[c + half];
                y[c] = one + other;
                y[c + half] = one - other;
            }
}

// Rotates the columns [from, to) of a vector.
void rotate_slab(const float* signs, int64_t from, int64_t to, float* y) {
    int64_t cols = 1;
    while (2 * cols <= to - from) cols *= 2;
    transform(signs + from, cols, y + from);
    if (from + cols < to) transform(signs + to - cols, cols, y + to - cols);
}

// How far from 0 codes of y [steps, 8] reach: to the largest value, or less where the error of what
// lies beyond is less than what finer codes save. 0, where all values are tiny: then the error is
// the norm, whose square is given.
float reach_of(const Kernels& kernels, const float* y, int64_t width, float largest,
               double square) {
    constexpr float DEVIATIONS = 2.7f;  // with 16 codes, best for normally distributed values
    constexpr float WORTH = 1.15f;      // so much finer codes save more than eight bits then lose
    if (largest < TINY) return 0.0f;
    const float reach = DEVIATIONS * float(std::sqrt(square / double(width)));
    if (!(WORTH * reach < largest)) return largest;
    const float beyond = kernels.square_beyond(y, code_steps(Source::NIBBLES, width), reach);
    const auto rounded = [&](double to) { return double(width) * to * to / (64.0 * 12.0); };
    return beyond + rounded(reach) < rounded(largest) ? reach : largest;
}

}  // namespace

float quantize(const float* x, int64_t dim, float least, int8_t* codes) {
    constexpr float MOST = 0.9999999f * (FLT_MAX / 127.0f);  // 127 times it is finite
    constexpr float WHOLE = 12582912.0f;  // 1.5 · 2^23: what is added to it is rounded to integers
    float largest = 0.0f;
    for (int64_t c = 0; c < dim; ++c) largest = std::max(largest, std::abs(x[c]));
    if (largest < least) largest = 0.0f;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t c = 0; c < dim; ++c) {
        const float scaled = std::min(std::max(x[c] * inverse, -127.0f), 127.0f);
        codes[c] = int8_t(int32_t(scaled + WHOLE - WHOLE));
    }
    return std::min(largest / 127.0f, MOST);
}

Codes encode(const float* x, int64_t dim) {
    Codes coded = {std::vector<int8_t>((dim + 3) / 4 * 4), 0.0f, 0.0};
    coded.scale = quantize(x, dim, TINY, coded.codes.data());
    double error = 0.0;
    for (int64_t c = 0; c < dim; ++c) {
        const double rest = x[c] - double(coded.scale) * coded.codes[c];
        error += rest * rest;
    }
    coded.error = std::sqrt(error);
    return coded;
}

CodedQuery code_query(const Kernels& kernels, Source source, const float* x, int64_t dim) {
    if (source == Source::SIGNS) return signs_of(x, dim);
    Codes coded = encode(x, dim);
    int32_t sum = 0;
    for (int8_t code : coded.codes) sum += code;
    const int64_t quads = source == Source::CODES ? 1 : 2, steps = code_steps(source, dim);
    const int64_t bytes = source == Source::CODES ? kernels.quad_bytes : 4;
    coded.codes.resize(steps * quads * 4);
    CodedQuery query = {std::vector<char>(steps * quads * bytes),
                        quads * bytes,
                        -128 * sum,
                        -7.5f * float(sum),
                        coded.scale,
                        coded.error,
                        {}};
    for (int64_t i = 0; i < steps * quads; ++i)
        put_quad(coded.codes.data() + 4 * i, bytes, query.steps.data() + i * bytes);
    query.plain.swap(coded.codes);
    return query;
}

void put_codes(const Codes& codes, int64_t row, uint8_t* tiles) {
    const int64_t count = int64_t(codes.codes.size());
    uint8_t* first = tiles + row / TILE * code_tile_bytes(Source::CODES, count) + row % TILE * 4;
    for (int64_t c = 0; c < count; ++c)
        first[c / 4 * TILE * 4 + c % 4] = uint8_t(codes.codes[c] + 128);
}

void centred(const float* x, const float* centre, int64_t dim, float* y) {
    for (int64_t c = 0; c < dim; ++c) y[c] = centre ? x[c] - centre[c] : x[c];
}

void rotate(const Ladder& ladder, int64_t dim, float* y) {
    if (!ladder.signs) return;
    int64_t from = 0;
    for (int64_t to : ladder.dims) {
        if (to > dim) break;
        rotate_slab(ladder.signs, from, to, y);
        from = to;
    }
}

LadderCoder::LadderCoder(const Kernels& kernels, const Ladder& ladder)
    : kernels_(kernels),
      ladder_(ladder),
      width_(ladder.dims.empty() ? 0 : ladder.dims.back()),
      steps_(code_steps(Source::NIBBLES, width_)),
      centre_(steps_ * 8),
      zeros_(steps_ * 8),
      beside_(steps_ * 8),
      codes_(steps_ * 8),
      nibbles_(TILE * steps_),
      tile_(TILE * steps_) {
    if (ladder.centre) std::copy_n(ladder.centre, width_, centre_.data());
    for (std::vector<float>* each : {&stats_.factors, &stats_.terms, &stats_.inverses})
        each->resize(ladder.dims.size());
}

const LadderStats& LadderCoder::code(const float* x, int lane, uint8_t* lows) {
    describe(x);
    const float to = reach_of(kernels_, beside_.data(), width_, coded_.largest, coded_.beside);
    stats_.scale = to / 8.0f;
    RowCodes codes = {codes_.data(), nibbles_.data() + lane * steps_, lows, 0.0, 0.0};
    kernels_.code_row(
        {beside_.data(), width_, steps_, to > 0.0f ? 128.0f / to : 0.0f, stats_.scale}, &codes);
    stats_.error = error_of(codes.square);
    stats_.low_error = error_of(codes.low_square);
    return stats_;
}

// Computes the statistics of each prefix.
void LadderCoder::describe(const float* x) {
    const MetricTerms& terms = terms_of(ladder_.metric);
    sums_ = coded_ = {};
    for (int64_t i = 0, from = 0; i < int64_t(ladder_.dims.size()); from = ladder_.dims[i++]) {
        kernels_.add_prefix(x + from, centre_.data() + from, ladder_.dims[i] - from,
                            beside_.data() + from, &sums_);
        if (ladder_.signs) {
            float* y = beside_.data() + from;
            rotate_slab(ladder_.signs, from, ladder_.dims[i], beside_.data());
            kernels_.add_prefix(y, zeros_.data(), ladder_.dims[i] - from, y, &coded_);
        } else {
            coded_ = sums_;
        }
        const double norm = std::sqrt(sums_.square), inverse = norm > 0.0 ? 1.0 / norm : 0.0,
                     factor = coded_.along > 0.0 ? coded_.beside / coded_.along : 0.0;
        stats_.factors[i] = float(terms.normalized ? factor * inverse : factor);
        stats_.terms[i] = float(terms.normalized       ? sums_.of_centre * inverse
                                : terms.squares > 0.0f ? sums_.beside
                                                       : sums_.of_centre);
        stats_.inverses[i] = float(inverse);
    }
    stats_.norm = std::sqrt(sums_.square);
    stats_.size = std::sqrt(coded_.beside);
}

// A norm with room for the rounding of y, of what the codes stand for and of their difference.
double LadderCoder::error_of(double square) const {
    const double error = std::sqrt(square);
    return error + std::ldexp(4.0, -24) * (2.0 * stats_.size + error);
}

void LadderCoder::put(int64_t tile, int first, int count, const SpanArrays& to) {
    RowColumns rows[TILE];
    for (int r = 0; r < count; ++r) rows[r] = {nibbles_.data() + (first + r) * steps_, nullptr};
    uint8_t *nibbles = to.nibbles + 4 * TILE * tile * steps_,
            *signs = to.signs + TILE * tile * steps_;
    // Four bytes of nibbles are moved like an fp32.
    kernels_.pack(rows, nullptr, DType::F32, count, steps_, tile_.data());
    for (int64_t i = 0; i < steps_; ++i)
        std::memcpy(nibbles + 4 * (i * TILE + first), tile_.data() + i * TILE, 4 * count);
    kernels_.tile_signs(nibbles, steps_, first, count, signs);
}

}  // namespace mrl
