#include "cpu/search/codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mrl {

Codes encode(const float* x, int64_t dim) {
    Codes coded = {std::vector<int8_t>(quads_of(dim) * 4), 0.0f, 0.0};
    float largest = 0.0f;
    for (int64_t c = 0; c < dim; ++c) largest = std::max(largest, std::abs(x[c]));
    if (largest < TINY) largest = 0.0f;  // the error says so
    coded.scale = largest / 127.0f;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    double error = 0.0;
    for (int64_t c = 0; c < dim; ++c) {
        const float scaled = std::min(std::max(x[c] * inverse, -127.0f), 127.0f);
        coded.codes[c] = int8_t(std::lrint(scaled));
        const double rest = x[c] - double(coded.scale) * coded.codes[c];
        error += rest * rest;
    }
    coded.error = std::sqrt(error);
    return coded;
}

void put_codes(const Codes& codes, int64_t row, uint8_t* tiles) {
    const int64_t count = int64_t(codes.codes.size());
    uint8_t* first = tiles + row / TILE * code_tile_bytes(count) + row % TILE * 4;
    for (int64_t c = 0; c < count; ++c)
        first[c / 4 * TILE * 4 + c % 4] = uint8_t(codes.codes[c] + 128);
}

void put_quad(const int8_t* codes, int64_t bytes, char* quad) {
    const int16_t wide[4] = {codes[0], codes[2], codes[1], codes[3]};
    if (bytes == 4)
        std::memcpy(quad, codes, 4);
    else
        std::memcpy(quad, wide, 8);
}

int32_t offset_of(const Codes& query) {
    int32_t sum = 0;
    for (int8_t code : query.codes) sum += code;
    return -128 * sum;
}

}  // namespace mrl
