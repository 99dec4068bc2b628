// A failed check prints its place, its values and the scenario, and ends the program.
#pragma once

#include <cmath>
#include <cstdlib>
#include <iostream>
#include <string>

inline std::string scenario;  // set by one thread while no other runs
inline double seconds = 2;    // how long each part of a test runs that has no end of its own

template <class... Values>
[[noreturn]] void fail(const char* file, int line, const char* what, const Values&... values) {
    std::cerr.precision(9);
    std::cerr << file << ":" << line << ": not " << what;
    [[maybe_unused]] const char* separator = ": ";
    ((std::cerr << separator << values, separator = ", "), ...);
    std::cerr << "\n  in " << scenario << std::endl;
    std::_Exit(1);
}

#define CHECK(condition) ((condition) ? void() : fail(__FILE__, __LINE__, #condition))
#define CHECK_EQUAL(actual, expected) \
    check_equal(__FILE__, __LINE__, #actual " == " #expected, actual, expected)
#define CHECK_NEAR(actual, expected, budget) \
    check_near(__FILE__, __LINE__, #actual " ~ " #expected, actual, expected, budget)

template <class A, class B>
void check_equal(const char* file, int line, const char* what, const A& actual, const B& expected) {
    if (!(actual == expected)) fail(file, line, what, actual, expected);
}

inline void check_near(const char* file, int line, const char* what, double actual, double expected,
                       double budget) {
    if (actual == expected) return;  // both infinite
    if (!(std::abs(actual - expected) <= budget)) fail(file, line, what, actual, expected, budget);
}
