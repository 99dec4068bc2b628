// mrl_fast._C: raw pointers and sizes, as integers; mrl_fast/cpu owns the arrays and has checked
// them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/engine.h"
#include "cpu/nested.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace mrl;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
T get(const py::dict& fields, const char* name, T otherwise = T()) {
    return fields.contains(name) ? fields[name].cast<T>() : otherwise;
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
    m.attr("ROWS") = ROWS;
    m.attr("GROUP_ROWS") = GROUP_ROWS;
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
    // Fields as in nested.h; an address that is not named is null, a factor 1, a flag false.
    py::class_<Scores>(m, "Scores").def(py::init([](const py::kwargs& fields) {
        Scores s = {};
        s.x = {at<float>(get<uintptr_t>(fields, "x")), get<int64_t>(fields, "x_stride")};
        s.w = {at<float>(get<uintptr_t>(fields, "w")), get<int64_t>(fields, "w_stride")};
        s.rows = get<int64_t>(fields, "rows");
        s.cols = get<int64_t>(fields, "cols");
        s.dims = fields["dims"].cast<std::vector<int64_t>>();
        s.bias = at<float>(get<uintptr_t>(fields, "bias"));
        s.row_scale = at<float>(get<uintptr_t>(fields, "row_scale"));
        s.col_scale = at<float>(get<uintptr_t>(fields, "col_scale"));
        s.cols_apart = get<int64_t>(fields, "cols_apart");
        s.target = at<int64_t>(get<uintptr_t>(fields, "target"));
        s.first_col = get<int64_t>(fields, "first_col");
        s.period = get<int64_t>(fields, "period", 1);
        s.exclude_own = get<bool>(fields, "exclude_own");
        s.own_boost = get<float>(fields, "own_boost", 1.0f);
        s.other_boost = get<float>(fields, "other_boost", 1.0f);
        s.soft = at<float>(get<uintptr_t>(fields, "soft"));
        s.soft_stride = get<int64_t>(fields, "soft_stride");
        s.mask = at<uint8_t>(get<uintptr_t>(fields, "mask"));
        s.mask_stride = get<int64_t>(fields, "mask_stride");
        s.sigmoid = get<bool>(fields, "sigmoid");
        return s;
    }));
    m.def("fold", [](const Scores& scores, int threads, const std::string& isa, uintptr_t row_max,
                     uintptr_t row_sum, uintptr_t labels, uintptr_t soft_sum, uintptr_t hit,
                     uintptr_t col_max, uintptr_t col_sum) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        fold(kernels, scores, threads, at<float>(row_max), at<double>(row_sum), at<int64_t>(labels),
             at<double>(soft_sum), at<float>(hit), at<float>(col_max), at<double>(col_sum));
    });
    m.def("store_scores", [](const Scores& scores, int threads, const std::string& isa,
                             uintptr_t out, int64_t out_apart, int64_t out_stride) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        store_scores(kernels, scores, threads, at<float>(out), out_apart, out_stride);
    });
    m.def("gradients",
          [](const Scores& scores, int threads, const std::string& isa, const py::dict& given,
             int64_t workspace_bytes, uintptr_t dx, int64_t dx_stride, uintptr_t dw,
             int64_t dw_stride, uintptr_t d_row_scale, uintptr_t d_col_scale, uintptr_t db) {
              const Kernels& kernels = kernels_named(isa);
              const auto array = [&](const char* name) {
                  return at<const float>(get<uintptr_t>(given, name));
              };
              const Given from = {array("row_max"),
                                  array("row_log"),
                                  array("d_row"),
                                  array("d_hit"),
                                  array("d_soft"),
                                  array("col_max"),
                                  array("col_log"),
                                  array("d_col"),
                                  array("soft_total"),
                                  array("grad"),
                                  get<int64_t>(given, "grad_apart"),
                                  get<int64_t>(given, "grad_stride")};
              py::gil_scoped_release unlocked;
              gradients(kernels, scores, from, threads, workspace_bytes, at<float>(dx), dx_stride,
                        at<float>(dw), dw_stride, at<float>(d_row_scale), at<float>(d_col_scale),
                        at<float>(db));
          });
}
