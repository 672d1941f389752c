// Functions that Python calls (tests/cuda/runner.py):
//   EXPORTED walk(const float* maps, int64_t steps) { return cuda_on_cpu::message_of([&] { ... }); }
// Parameters are pointers, int64_t and double; an exception reaches Python as runner.CudaError.
#pragma once
#include <cstdint>
#include <exception>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default"))) const char*

namespace cuda_on_cpu {

template <class Body>
const char* message_of(Body body) noexcept {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "an exception that is no std::exception";
  }
  return message.c_str();
}

}  // namespace cuda_on_cpu
