// mrl_fast._C: raw pointers and sizes, as integers; mrl_fast/cpu.py owns the arrays and has checked
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/engine.h"
#include "cpu/parallel.h"
#include "cpu/softmax.h"

namespace py = pybind11;
using namespace mrl;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

const Kernels& kernels_named(const std::string& name) {
    const std::vector<const Kernels*> available = available_kernels();
    if (name.empty()) return *available.front();
    for (const Kernels* kernels : available)
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("isa: this processor has no " + name);
}

// Empty where all went well, else what is wrong with the vectors.
std::string message(Status status) {
    switch (status) {
        case Status::NOT_FINITE:
            return "not finite";
        case Status::OVERFLOW_:
            return "overflow";
        default:
            return "";
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("TILE") = TILE;
    m.def("use_openmp", [](const std::string& library) { return use_openmp(library.c_str()); });
    m.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available_kernels()) names.push_back(kernels->name);
        return names;
    });
    m.def("search",
          [](uintptr_t packed, int64_t packed_dim, uintptr_t tail, int dtype, int64_t stride,
             int64_t n, uintptr_t queries, int64_t num_queries, int64_t query_stride, int metric,
             const std::vector<std::pair<int64_t, int64_t>>& stages, int threads,
             const std::string& isa, uintptr_t scores, uintptr_t ids) {
              const Kernels& kernels = kernels_named(isa);
              std::vector<Stage> list;
              for (const auto& [dim, keep] : stages) list.push_back({dim, keep});
              py::gil_scoped_release unlocked;
              return message(search(
                  kernels, {at<float>(packed), packed_dim, at<void>(tail), DType(dtype), stride, n},
                  {at<float>(queries), num_queries, query_stride}, Metric(metric), list, threads,
                  at<float>(scores), at<int64_t>(ids)));
          });
    m.def("rerank", [](uintptr_t data, int dtype, int64_t stride, int64_t n, uintptr_t queries,
                       int64_t num_queries, int64_t query_stride, int metric, uintptr_t candidates,
                       int64_t count, int64_t dim, int64_t k, int threads, const std::string& isa,
                       uintptr_t scores, uintptr_t ids) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        return message(rerank(kernels, {nullptr, 0, at<void>(data), DType(dtype), stride, n},
                              {at<float>(queries), num_queries, query_stride}, Metric(metric),
                              at<int64_t>(candidates), count, dim, k, threads, at<float>(scores),
                              at<int64_t>(ids)));
    });
    m.def("pack_rows", [](uintptr_t data, int dtype, int64_t stride, int64_t n, int64_t cols,
                          int threads, const std::string& isa, uintptr_t tiles) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        return message(pack_rows(kernels, at<void>(data), DType(dtype), stride, n, cols, threads,
                                 at<float>(tiles)));
    });
    m.def("softmax_stats",
          [](uintptr_t scores, int64_t rows, int64_t cols, uintptr_t soft, int threads,
             const std::string& isa, uintptr_t row_max, uintptr_t sum, uintptr_t soft_sum) {
              const Kernels& kernels = kernels_named(isa);
              py::gil_scoped_release unlocked;
              softmax_stats(kernels, at<float>(scores), rows, cols, at<float>(soft), threads,
                            at<float>(row_max), at<float>(sum), at<double>(soft_sum));
          });
    m.def("softmax_grad",
          [](uintptr_t scores, int64_t rows, int64_t cols, uintptr_t soft, int threads,
             const std::string& isa, uintptr_t row_max, uintptr_t log_sum, uintptr_t p_scale,
             uintptr_t soft_scale, uintptr_t grad) {
              const Kernels& kernels = kernels_named(isa);
              py::gil_scoped_release unlocked;
              softmax_grad(kernels, at<float>(scores), rows, cols, at<float>(soft), threads,
                           at<float>(row_max), at<float>(log_sum), at<float>(p_scale),
                           at<float>(soft_scale), at<float>(grad));
          });
}
