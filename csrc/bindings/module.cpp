// mrl_fast._C: functions for both wings; search.cpp and training.cpp beside it add their own.
#include "bindings/bindings.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

using namespace mrl;

namespace {

// Runs the handlers of pending signals; true if one raised, which is then this thread's Python
// error.
bool signal_raised() {
    const PyGILState_STATE state = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(state);
    return raised;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    stop_where(signal_raised);
    pybind11::register_local_exception_translator([](std::exception_ptr error) {
        try {
            std::rethrow_exception(error);
        } catch (const Interrupted&) {
            // `signal_raised` has set the error.
        }
    });
    m.attr("TILE") = TILE;
    m.attr("SCALE_BYTES") = SCALE_BYTES;
    m.def("use_openmp", [](const std::string& library) { return use_openmp(library.c_str()); });
    m.def("available", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available_kernels()) names.push_back(kernels->name);
        return names;
    });
    m.def("advise_huge_pages",
          [](Address<void> begin, size_t bytes) { advise_huge_pages(begin, bytes); });
    bind_search(m);
    bind_training(m);
}
