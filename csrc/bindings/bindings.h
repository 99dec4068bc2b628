// Argument types of both wings' bindings: addresses, and instruction sets by name.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "cpu/simd/kernels.h"

namespace mrl {

// Python passes addresses as integers, 0 for none; it owns the arrays and has checked them.
template <class T>
struct Address {
    T* at;
    operator T*() const { return at; }
};

// The kernels of an instruction set; an empty name is the best that this processor has.
inline const Kernels& kernels_named(const std::string& name) {
    const std::vector<const Kernels*> available = available_kernels();
    if (name.empty()) return *available.front();
    for (const Kernels* kernels : available)
        if (name == kernels->name) return *kernels;
    throw std::invalid_argument("isa: this processor has no " + name);
}

// How a call runs, as Python says it: the instruction set and the number of threads.
using RunFields = std::tuple<std::string, int>;
inline Run run_of(const RunFields& fields) {
    return {kernels_named(std::get<0>(fields)), std::get<1>(fields)};
}

// Builds a struct from a tuple of its fields, which stand in the struct's order.
template <class Struct, class... Fields>
Struct made_of(const std::tuple<Fields...>& fields) {
    return std::apply([](const auto&... values) { return Struct{values...}; }, fields);
}

void bind_search(pybind11::module_& m);
void bind_training(pybind11::module_& m);

}  // namespace mrl

namespace pybind11 {
namespace detail {

template <class T>
struct type_caster<mrl::Address<T>> {
    PYBIND11_TYPE_CASTER(mrl::Address<T>, const_name("int"));
    bool load(handle source, bool convert) {
        make_caster<uintptr_t> number;
        if (!number.load(source, convert)) return false;
        value = {reinterpret_cast<T*>(cast_op<uintptr_t>(number))};
        return true;
    }
};

}  // namespace detail
}  // namespace pybind11
