#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace llama_moe {

// Base of every error the core raises on purpose. Bindings map each class to the Python class of the same name.
class Error : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

class ModelLoadError : public Error {
    using Error::Error;
};

class PlacementError : public Error {
    using Error::Error;
};

// What a device is too small by.
struct Shortfall {
    std::string device;
    std::uint64_t needed;    // bytes
    std::uint64_t capacity;  // bytes
    std::uint64_t missing() const { return needed - capacity; }
};

class DoesNotFitError : public Error {
   public:
    explicit DoesNotFitError(const std::string& message, std::vector<Shortfall> shortfalls = {}, std::vector<std::string> changes = {})
        : Error(message), shortfalls(std::move(shortfalls)), changes(std::move(changes)) {}

    std::vector<Shortfall> shortfalls;  // empty where only a failed allocation is known
    std::vector<std::string> changes;   // options with which it would fit, such as "context_size=2048", each alone
};

class ContextFullError : public Error {
    using Error::Error;
};

class DecodeError : public Error {
    using Error::Error;
};

class QueueFullError : public Error {
    using Error::Error;
};

class ClosedError : public Error {
    using Error::Error;
};

class CancelledError : public Error {
    using Error::Error;
};

class TimeoutError : public Error {
    using Error::Error;
};

class InvalidOptionError : public Error {
    using Error::Error;
};

class FileNotFoundError : public Error {
    using Error::Error;
};

// A tensor that cannot be quantised, such as one with values that are not finite.
class QuantizeError : public Error {
    using Error::Error;
};

// The system refused to read or write a file. Python's OSError.
class FileError : public Error {
   public:
    FileError(int code, const std::string& message) : Error(message), code_(code) {}
    int code() const { return code_; }  // errno

   private:
    int code_;
};

}  // namespace llama_moe
