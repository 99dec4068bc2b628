// What a scan reads: queries side by side, tiles one after the other.
#include <algorithm>
#include <cstring>

#include "cpu/search/scan.h"

namespace mrl {

bool finite(const Queries& queries, int64_t dim) {
    float check = 0.0f;  // becomes NaN on the first value that is not finite
    for (int64_t q = 0; q < queries.n; ++q)
        for (int64_t c = 0; c < dim; ++c) check += queries.data[q * queries.stride + c] * 0.0f;
    return check == 0.0f;
}

Codes encode(const float* x, int64_t dim) {
    Codes coded = {std::vector<int8_t>((dim + 3) / 4 * 4), 0.0f, 0.0};
    float largest = 0.0f;
    for (int64_t c = 0; c < dim; ++c) largest = std::max(largest, std::abs(x[c]));
    if (largest < TINY) largest = 0.0f;  // the error says so
    coded.unit = largest / 127.0f;
    const float codes_a_unit = largest > 0.0f ? 127.0f / largest : 0.0f;
    double error = 0.0;
    for (int64_t c = 0; c < dim; ++c) {
        const float scaled = std::min(std::max(x[c] * codes_a_unit, -127.0f), 127.0f);
        coded.codes[c] = int8_t(std::lrint(scaled));
        const double rest = x[c] - double(coded.unit) * coded.codes[c];
        error += rest * rest;
    }
    coded.error = std::sqrt(error);
    return coded;
}

template <class Fn>
void Panel::group(int64_t count, int64_t bytes_a_query, const Fn& fill) {
    data_.reset(new char[count * bytes_a_query + 1]);
    const int64_t groups = (count + MAX_GROUP - 1) / MAX_GROUP;
    int64_t first = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t size = count / groups + (g < count % groups);
        char* data = data_.get() + first * bytes_a_query;
        for (int64_t q = 0; q < size; ++q) fill(first + q, data, size, q);
        groups_.push_back({first, size, data});
        first += size;
    }
}

Panel::Panel(const Queries& queries, int64_t dim) {
    group(queries.n, dim * sizeof(float), [&](int64_t q, char* data, int64_t size, int64_t at) {
        const float* query = queries.data + q * queries.stride;
        float* columns = reinterpret_cast<float*>(data);
        for (int64_t c = 0; c < dim; ++c) columns[c * size + at] = query[c];
    });
}

Panel::Panel(const Kernels& kernels, const std::vector<Codes>& coded) : offsets_(coded.size()) {
    const int64_t dim = coded.empty() ? 0 : coded[0].codes.size(), bytes = kernels.quad_bytes;
    group(coded.size(), dim / 4 * bytes, [&](int64_t q, char* data, int64_t size, int64_t at) {
        const int8_t* code = coded[q].codes.data();
        for (int64_t c = 0; c < dim; ++c) offsets_[q] -= 128 * code[c];
        for (int64_t i = 0; i < dim / 4; ++i, code += 4) {
            char* quad = data + (i * size + at) * bytes;
            const int16_t wide[4] = {code[0], code[2], code[1], code[3]};
            if (bytes == 4)
                std::memcpy(quad, code, 4);
            else
                std::memcpy(quad, wide, 8);
        }
    });
}

}  // namespace mrl
