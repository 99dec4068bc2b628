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

LadderCoder::LadderCoder(const Kernels& kernels, const Ladder& ladder)
    : kernels_(kernels), ladder_(ladder) {
    if (ladder.dims.empty()) return;
    const int64_t columns = code_steps(Source::NIBBLES, ladder.dims.back()) * 8;
    codes_.assign(columns, 128);
    for (std::vector<float>* each : {&beside_, &rest_, &signs_}) each->assign(columns, 0.0f);
    for (std::vector<float>* each : {&stats_.factors, &stats_.terms, &stats_.inverses})
        each->resize(ladder.dims.size());
}

// Each loop does one simple operation, so that compilers vectorize it.
const LadderStats& LadderCoder::code(const float* x) {
    const int64_t width = ladder_.dims.back();
    float *y = beside_.data(), *sign = signs_.data();
    centred(x, ladder_.centre, width, y);
    constexpr int LANES = 8;
    float most[LANES] = {};
    for (int64_t c = 0; c < int64_t(beside_.size()); c += LANES)
        for (int i = 0; i < LANES; ++i) {
            const float size = std::abs(y[c + i]);
            most[i] = most[i] > size ? most[i] : size;
        }
    float largest = *std::max_element(most, most + LANES);
    const float reach = reach_of(largest);
    const float inverse = reach > 0.0f ? 128.0f / reach : 0.0f;
    for (int64_t c = 0; c < width; ++c) {
        const float at = y[c] * inverse + 128.0f, least = at > 0.0f ? at : 0.0f;
        codes_[c] = uint8_t(int(least < 255.0f ? least : 255.0f));
    }
    for (int64_t c = 0; c < width; ++c) sign[c] = codes_[c] >= 128 ? 1.0f : -1.0f;
    describe(x);
    stats_.scale = reach / 8.0f;
    stats_.error = error_of(stats_.scale, 4, 7.5f);
    stats_.low_error = error_of(stats_.scale / 16.0f, 0, 127.5f);
    return stats_;
}

// How far from 0 codes reach: to the largest value, or less where the error of what lies beyond is
// less than what finer codes save. 0, where all values are tiny: then the error is the norm.
float LadderCoder::reach_of(float largest) const {
    constexpr float DEVIATIONS = 2.7f;  // with 16 codes, best for normally distributed values
    constexpr float WORTH = 1.15f;      // so much finer codes save more than eight bits then lose
    if (largest < TINY) return 0.0f;
    const int64_t width = ladder_.dims.back();
    const float* y = beside_.data();
    const double square = kernels_.dot64(y, y, width);
    const float reach = DEVIATIONS * float(std::sqrt(square / double(width)));
    if (!(WORTH * reach < largest)) return largest;
    constexpr int LANES = 8;
    float beyond[LANES] = {}, sum = 0.0f;
    for (int64_t c = 0; c < int64_t(beside_.size()); c += LANES)
        for (int i = 0; i < LANES; ++i) {
            const float over = std::abs(y[c + i]) - reach, more = over > 0.0f ? over : 0.0f;
            beyond[i] += more * more;
        }
    for (float each : beyond) sum += each;
    const auto rounded = [&](double to) { return double(width) * to * to / (64.0 * 12.0); };
    return sum + rounded(reach) < rounded(largest) ? reach : largest;
}

// The norm of y less what the codes stand for without their last `shift` bits.
double LadderCoder::error_of(float scale, int shift, float zero) {
    const int64_t width = ladder_.dims.back();
    const float* y = beside_.data();
    float* rest = rest_.data();
    for (int64_t c = 0; c < width; ++c) rest[c] = y[c] - (float(codes_[c] >> shift) - zero) * scale;
    const double error = std::sqrt(kernels_.dot64(rest, rest, width));
    // With room for the rounding of y, of what the codes stand for and of their difference.
    return error + std::ldexp(4.0, -24) * (2.0 * stats_.size + error);
}

// Computes the statistics of each prefix from x, y and the signs of y.
void LadderCoder::describe(const float* x) {
    const MetricTerms& terms = terms_of(ladder_.metric);
    const float *y = beside_.data(), *sign = signs_.data(), *centre = ladder_.centre;
    double square = 0.0, beside = 0.0, along = 0.0, of_centre = 0.0;  // ‖x‖², ‖y‖², ‖y‖₁, ⟨c, x⟩
    for (int64_t i = 0, from = 0; i < int64_t(ladder_.dims.size()); from = ladder_.dims[i++]) {
        const int64_t cols = ladder_.dims[i] - from;
        square += kernels_.dot64(x + from, x + from, cols);
        beside += kernels_.dot64(y + from, y + from, cols);
        along += kernels_.dot64(y + from, sign + from, cols);
        if (centre) of_centre += kernels_.dot64(centre + from, x + from, cols);
        const double norm = std::sqrt(square), inverse = norm > 0.0 ? 1.0 / norm : 0.0,
                     factor = along > 0.0 ? beside / along : 0.0;
        stats_.factors[i] = float(terms.normalized ? factor * inverse : factor);
        stats_.terms[i] = float(terms.normalized       ? of_centre * inverse
                                : terms.squares > 0.0f ? beside
                                                       : of_centre);
        stats_.inverses[i] = float(inverse);
    }
    stats_.norm = std::sqrt(square);
    stats_.size = std::sqrt(beside);
}

void LadderCoder::put(int64_t row, const SpanArrays& to) const {
    const int64_t steps = codes_.size() / 8, first = row / TILE * steps * TILE + row % TILE,
                  half = 4 * steps;
    uint8_t *signs = to.signs + first, *nibbles = to.nibbles + 4 * first,
            *lows = to.lows + half * row;
    for (int64_t j = 0; j < half; ++j)
        lows[j] = uint8_t((codes_[j] & 15) | (codes_[half + j] & 15) << 4);
    for (int64_t i = 0; i < steps; ++i, signs += TILE, nibbles += TILE * 4) {
        uint64_t codes = 0;  // the first in the lowest byte
        for (int j = 0; j < 8; ++j) codes |= uint64_t(codes_[8 * i + j]) << 8 * j;
        const uint64_t high = codes >> 4 & 0x0f0f0f0f0f0f0f0fu;
        const uint32_t highs = uint32_t(high) | uint32_t(high >> 32) << 4;
        for (int j = 0; j < 4; ++j) nibbles[j] = uint8_t(highs >> 8 * j);
        // The product gathers the eight bytes' bits in its highest byte.
        *signs = uint8_t((codes >> 7 & 0x0101010101010101u) * 0x0102040810204080u >> 56);
    }
}

}  // namespace mrl
