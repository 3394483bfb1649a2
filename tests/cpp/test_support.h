// A small test framework: TEST_CASE registers, CHECK* report and go on, REQUIRE ends the case. ISOLATED_TEST_CASE runs in a
// process of its own, because it leaves that process with a device that died, a thread that never ends or the like.
#pragma once

#include <functional>
#include <iostream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace test {

struct Case {
    std::string name;
    std::function<void()> body;
    bool isolated = false;
};

std::vector<Case> & cases();

// Counts a failed check and prints where it is and what it said.
void fail(const char * file, int line, const std::string & what);

inline bool contains(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

// Thrown by REQUIRE, to leave a case that cannot go on.
struct Stop {};

struct Register {
    Register(std::string name, std::function<void()> body, bool isolated) {
        cases().push_back({std::move(name), std::move(body), isolated});
    }
};

template <typename T, typename = void>
struct is_printable : std::false_type {};
template <typename T>
struct is_printable<T, std::void_t<decltype(std::declval<std::ostream &>() << std::declval<const T &>())>> : std::true_type {};

template <typename T>
std::string show(const T & value) {
    std::ostringstream out;
    if constexpr (is_printable<T>::value) {
        out << std::boolalpha << value;
    } else {
        out << "a value that cannot be printed";
    }
    return out.str();
}

template <typename T>
std::string show(const std::vector<T> & values) {
    std::string out = "[";
    for (const auto & value : values) {
        out += (out.size() > 1 ? ", " : "") + show<T>(value);
    }
    return out + "]";
}

template <typename T>
std::string show(const std::optional<T> & value) {
    return value ? show(*value) : "nothing";
}

template <typename A, typename B>
void check_equal(const char * file, int line, const char * text, const A & actual, const B & expected) {
    if (!(actual == expected)) {
        fail(file, line, std::string(text) + "\n    got      " + show(actual) + "\n    expected " + show(expected));
    }
}

// Returns the message, so that a test can look at what a user is told.
template <typename Error, typename Body>
std::string check_throws(const char * file, int line, const char * text, const Body & body) {
    try {
        body();
    } catch (const Error & error) {
        return error.what();
    } catch (const std::exception & error) {
        fail(file, line, std::string(text) + " threw another exception: " + error.what());
        return error.what();
    }
    fail(file, line, std::string(text) + " threw nothing");
    return {};
}

} // namespace test

#define TEST_JOIN_(a, b) a##b
#define TEST_JOIN(a, b) TEST_JOIN_(a, b)

#define TEST_REGISTER(name, isolated)                                                                           \
    static void TEST_JOIN(test_body_, __LINE__)();                                                              \
    static const test::Register TEST_JOIN(test_case_, __LINE__)(name, TEST_JOIN(test_body_, __LINE__), isolated); \
    static void TEST_JOIN(test_body_, __LINE__)()

#define TEST_CASE(name) TEST_REGISTER(name, false)
#define ISOLATED_TEST_CASE(name) TEST_REGISTER(name, true)

#define CHECK(condition)                               \
    do {                                               \
        if (!(condition)) {                            \
            test::fail(__FILE__, __LINE__, #condition); \
        }                                              \
    } while (false)

#define REQUIRE(condition)                             \
    do {                                               \
        if (!(condition)) {                            \
            test::fail(__FILE__, __LINE__, #condition); \
            throw test::Stop();                        \
        }                                              \
    } while (false)

#define CHECK_EQ(actual, expected) test::check_equal(__FILE__, __LINE__, #actual " == " #expected, actual, expected)

// CHECK_THROWS(InvalidOptionError, f(x)) is the exception's message.
#define CHECK_THROWS(error, expression) \
    test::check_throws<error>(__FILE__, __LINE__, #expression, [&] { static_cast<void>(expression); })
