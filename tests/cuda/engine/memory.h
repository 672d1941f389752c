// The device's memory: buffers by name, what of them was written, and who touched each word last.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_on_cpu {

enum Touch : unsigned { kRead = 1, kWrite = 2, kAtomic = 4 };  // or several

// The smallest group of threads that holds all of an Access. Two threads that touch a word, one of them writing, must
// have met in between: at a barrier of theirs that was complete after the first touch.
enum class Level : unsigned { kThread, kWarp, kBlock, kCluster, kGrid };

struct Access {
  uint32_t time : 31;    // 0: none
  uint32_t between : 1;  // made between arriving at a cluster's barrier and its completion: that one does not order it
  uint32_t thread : 29;  // one of them
  uint32_t level : 3;
  uint32_t where;  // code address, relative to the library
};

struct Cell {
  Access write, reads, atomics;
};

struct Region {
  unsigned char* begin;
  size_t bytes;
  const char* name;
  bool writable;
  bool* written;  // a flag each byte
  Cell* cells;    // one for each aligned word
};

size_t cells_of(const unsigned char* begin, size_t bytes);

// Buffers of the device. A new one holds garbage, far from every other.
unsigned char* allocate(const char* name, size_t bytes, size_t misaligned_by);
bool release(const unsigned char* begin);
void release_all();
Region* region_at(const void* address);  // or null

// Called for each access of a device thread that is not to its own stack.
void touch(const void* address, size_t bytes, unsigned kind, const void* where);

// The texts of what was found, a line each; {at 1f3} and {function 1f0} are addresses in this library, the one where a
// call returns to, the other a function's.
void report(const std::string& text, const void* where);
[[noreturn]] void report_and_stop(const std::string& text, const void* where);
const std::string& reports();
void forget_reports();
uint32_t relative(const void* where);

// Whether what `access` did is over for the running thread.
bool ordered(const Access& access);
// Takes the running thread's touch into an Access of several.
void add(Access& access, uint32_t where);

}  // namespace cuda_on_cpu
