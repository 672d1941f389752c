#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "grid.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGap = size_t(64) << 20;  // of addresses that belong to nobody, on both sides of a buffer
constexpr int kMaxReports = 8;

struct Buffer {
  Region region;
  std::string name;
  void* mapping;
  size_t mapped;
};

std::vector<std::unique_ptr<Buffer>> buffers;  // by address
Region* last_found = nullptr;
// A word that is touched in parts has a cell for each byte here instead.
std::unordered_map<const Cell*, std::array<Cell, 4>> split_cells;
constexpr unsigned kSplit = 7;  // in place of the level of the cell's write

std::string all_reports;
std::vector<uint64_t> reported;

struct Image {
  uintptr_t base = 0, begin = UINTPTR_MAX, end = 0;
};

int find_image(dl_phdr_info* info, size_t, void* result) {
  Image image;
  image.base = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    image.begin = std::min<uintptr_t>(image.begin, image.base + segment.p_vaddr);
    image.end = std::max<uintptr_t>(image.end, image.base + segment.p_vaddr + segment.p_memsz);
  }
  const auto here = reinterpret_cast<uintptr_t>(&find_image);
  if (here < image.begin || here >= image.end) return 0;
  *static_cast<Image*>(result) = image;
  return 1;
}

const Image image = [] {
  Image result;
  dl_iterate_phdr(find_image, &result);
  return result;
}();

}  // namespace

uint32_t relative(const void* where) { return uint32_t(reinterpret_cast<uintptr_t>(where) - image.base); }

namespace {

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string code(uint32_t where) { return "{at " + hex(where) + "}"; }

std::string quoted(const char* name) { return "'" + std::string(name) + "'"; }

std::string place(const Region& region, const unsigned char* at) {
  return quoted(region.name) + " + " + std::to_string(at - region.begin) + " (of " + std::to_string(region.bytes) +
         " bytes)";
}

std::string what(unsigned kind, size_t bytes) {
  const char* const verb = kind == kRead ? "read" : kind == kWrite ? "write" : "atomic operation";
  return std::string(verb) + " of " + std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

}  // namespace

void report(const std::string& text, const void* where) {
  if (!launching) return;
  // Once for each place in the code and sort of mistake.
  const uint64_t key =
      uint64_t(relative(where)) << 8 | uint64_t(static_cast<unsigned char>(text.empty() ? 0 : text[0]));
  if (std::find(reported.begin(), reported.end(), key) != reported.end()) return;
  reported.push_back(key);
  if (reported.size() > kMaxReports) return;
  all_reports += text + (running ? ", by " + name_of(*running) : "") + ", in kernel " + "{function " +
                 hex(relative(launching->kernel)) + "}" + (where ? ", " + code(relative(where)) : "") + "\n";
}

void report_and_stop(const std::string& text, const void* where) {
  report(text, where);
  stop();
}

const std::string& reports() { return all_reports; }

void forget_reports() {
  all_reports.clear();
  reported.clear();
}

size_t cells_of(const unsigned char* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return (address + bytes + 3) / 4 - address / 4;
}

unsigned char* allocate(const char* name, size_t bytes, size_t misaligned_by) {
  const size_t inner = (misaligned_by + bytes + kPage - 1) / kPage * kPage + kPage;
  auto buffer = std::make_unique<Buffer>();
  buffer->mapped = inner + 2 * kGap;
  buffer->mapping = mmap(nullptr, buffer->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (buffer->mapping == MAP_FAILED) return nullptr;
  unsigned char* const start = static_cast<unsigned char*>(buffer->mapping) + kGap;
  mprotect(start, inner, PROT_READ | PROT_WRITE);
  std::memset(start, 0xff, inner);
  buffer->name = name;
  Region& region = buffer->region;
  region.begin = start + misaligned_by;
  region.bytes = bytes;
  region.name = buffer->name.c_str();
  region.writable = true;
  region.written = static_cast<bool*>(std::calloc(bytes + 1, 1));
  region.cells = static_cast<Cell*>(std::calloc(cells_of(region.begin, bytes) + 1, sizeof(Cell)));
  unsigned char* const begin = region.begin;
  const auto at = std::lower_bound(buffers.begin(), buffers.end(), begin,
                                   [](const auto& other, unsigned char* key) { return other->region.begin < key; });
  buffers.insert(at, std::move(buffer));
  return begin;
}

bool release(const unsigned char* begin) {
  const auto at = std::find_if(buffers.begin(), buffers.end(),
                               [begin](const auto& buffer) { return buffer->region.begin == begin; });
  if (at == buffers.end()) return false;
  std::free((*at)->region.written);
  std::free((*at)->region.cells);
  munmap((*at)->mapping, (*at)->mapped);
  buffers.erase(at);
  split_cells.clear();
  last_found = nullptr;
  return true;
}

void release_all() {
  while (!buffers.empty()) release(buffers.back()->region.begin);
}

Region* region_at(const void* address) {
  const auto* const byte = static_cast<const unsigned char*>(address);
  if (last_found && byte >= last_found->begin && byte < last_found->begin + last_found->bytes) return last_found;
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), byte,
                                      [](const unsigned char* key, const auto& b) { return key < b->region.begin; });
  if (after == buffers.begin()) return nullptr;
  Region& region = std::prev(after)->get()->region;
  if (byte >= region.begin + region.bytes) return nullptr;
  return last_found = &region;
}

namespace {

// Without the two usual cases.
[[gnu::noinline]] bool ordered_by_barrier(const Access& access) {
  const Thread& own = *running;
  const auto level = Level(access.level);
  const unsigned block = block_of(access.thread);
  const bool same_block = block == own.block->rank;
  if (same_block || same_cluster(block, own.block->rank)) {
    if (access.time < (access.between ? own.cluster_before : own.cluster_seen)) return true;
  }
  if (!same_block || level > Level::kBlock) return false;
  if (access.time < own.block->last) return true;
  const unsigned rank = rank_of(access.thread);
  if (rank / kLanes != own.rank / kLanes || level > Level::kWarp) return false;
  const Warp& warp = own.block->warps[own.rank / kLanes];
  if (access.time < warp.last) return true;
  return warp.met && level == Level::kThread && access.time < warp.met->at[own.rank % kLanes][rank % kLanes];
}

Level common_level(const Thread& own, uint32_t other) {
  if (other == own.id) return Level::kThread;
  const unsigned block = block_of(other);
  if (block != own.block->rank) return same_cluster(block, own.block->rank) ? Level::kCluster : Level::kGrid;
  return rank_of(other) / kLanes == own.rank / kLanes ? Level::kWarp : Level::kBlock;
}

inline bool is_ordered(const Access& access) {
  if (access.time < grid_last) return true;  // none, before the launch, or before a barrier of the grid
  if (access.thread == running->id && Level(access.level) == Level::kThread) return true;
  return ordered_by_barrier(access);
}

inline void add_touch(Access& access, uint32_t where) {
  const Thread& own = *running;
  Level level = Level::kThread;
  bool held_back = between;
  if (!is_ordered(access)) {
    level = std::max(common_level(own, access.thread), Level(access.level));
    held_back = held_back || access.between;
  }
  access.time = now;
  access.between = held_back;
  access.thread = own.id;
  access.level = unsigned(level);
  access.where = where;
}

}  // namespace

bool ordered(const Access& access) { return is_ordered(access); }

void add(Access& access, uint32_t where) { add_touch(access, where); }

namespace {

std::string earlier(const Access& access, const char* did) {
  const char* const others[] = {"", " and others of its warp", " and others of its block", " and others of its cluster",
                                " and others of the grid"};
  return std::string(did) + " by " + name_of_thread(access.thread) + others[access.level] + " " + code(access.where);
}

void report_race(const Region& region, const unsigned char* at, size_t bytes, unsigned kind, const Access& other,
                 const char* did, const void* where) {
  report(
      "race: " + what(kind, bytes) + " at " + place(region, at) + " without a barrier after its " + earlier(other, did),
      where);
}

inline void trace(Cell& cell, const Region& region, const unsigned char* at, size_t bytes, unsigned kind,
                  const void* where) {
  const uint32_t here = relative(where);
  if (!is_ordered(cell.write)) report_race(region, at, bytes, kind, cell.write, "write", where);
  if (kind & kWrite && !is_ordered(cell.reads)) report_race(region, at, bytes, kind, cell.reads, "read", where);
  if (!(kind & kAtomic) && !is_ordered(cell.atomics)) {
    report_race(region, at, bytes, kind, cell.atomics, "atomic operation", where);
  }
  if (kind & kAtomic) return add_touch(cell.atomics, here);
  if (kind == kRead) return add_touch(cell.reads, here);
  cell.write = {};
  add_touch(cell.write, here);
  cell.reads = cell.atomics = {};
}

void trace(const Region& region, const unsigned char* begin, size_t bytes, unsigned kind, const void* where) {
  const auto first = reinterpret_cast<uintptr_t>(region.begin) / 4;
  const auto from = reinterpret_cast<uintptr_t>(begin), to = from + bytes;
  for (uintptr_t word = from / 4; word * 4 < to; ++word) {
    Cell& cell = region.cells[word - first];
    const bool whole = word * 4 >= from && word * 4 + 4 <= to;
    if (whole && cell.write.level != kSplit) {
      trace(cell, region, begin, bytes, kind, where);
      continue;
    }
    std::array<Cell, 4>& parts = split_cells[&cell];
    if (cell.write.level != kSplit) {
      parts.fill(cell);
      cell.write.level = kSplit;
    }
    for (uintptr_t byte = std::max(from, word * 4); byte < std::min(to, word * 4 + 4); ++byte) {
      trace(parts[byte % 4], region, begin, bytes, kind, where);
    }
  }
}

bool all_written(const bool* written, size_t bytes) {
  if (bytes != 4) return !std::memchr(written, 0, bytes);
  uint32_t flags;
  std::memcpy(&flags, written, 4);
  return flags == 0x01010101;
}

void touch_inside(const Region& region, const unsigned char* at, size_t bytes, unsigned kind, const void* where) {
  if (kind & kWrite && !region.writable) {
    report_and_stop(what(kind, bytes) + " to the input " + place(region, at), where);
  }
  bool* const written = region.written + (at - region.begin);
  if (kind & kRead && !all_written(written, bytes)) {
    report("uninitialised: " + what(kind, bytes) + " at " + place(region, at) + ", which nobody wrote", where);
  }
  if (kind & kWrite) std::memset(written, 1, bytes);
  if (region.writable) trace(region, at, bytes, kind, where);
}

[[noreturn]] void report_outside(const unsigned char* at, size_t bytes, unsigned kind, const void* where) {
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), at,
                                      [](const unsigned char* key, const auto& b) { return key < b->region.begin; });
  const size_t near = kGap / 2;
  if (after != buffers.begin()) {
    const Region& before = (*std::prev(after))->region;
    if (size_t(at - before.begin) < before.bytes + near) {
      report_and_stop("out of bounds: " + what(kind, bytes) + " at " + place(before, at), where);
    }
  }
  if (after != buffers.end() && size_t((*after)->region.begin - at) < near) {
    report_and_stop("out of bounds: " + what(kind, bytes) + " at " + place((*after)->region, at), where);
  }
  report_and_stop("out of bounds: " + what(kind, bytes) + " at address " + hex(reinterpret_cast<uintptr_t>(at)) +
                      ", which is no memory of the device",
                  where);
}

void touch_shared(const unsigned char* at, size_t bytes, unsigned kind, const void* where) {
  const size_t slot = size_t(at - shared_memory) / shared_pitch;
  if (slot >= wave.size()) report_outside(at, bytes, kind, where);
  Block& owner = wave[slot];
  Block& own = *running->block;
  if (&owner != &own) {
    const std::string whose = " of shared memory of block " + name_of_block(owner.rank);
    if (owner.cluster != own.cluster || launching->cluster_blocks == 1) {
      report_and_stop("out of bounds: " + what(kind, bytes) + whose + ", which is in no cluster with this one", where);
    }
    if (owner.exited == launching->threads) {
      report_and_stop("lifetime: " + what(kind, bytes) + whose + ", which has exited", where);
    }
    if (running->cluster_seen == 0 && grid_last == grid_start) {
      report("lifetime: " + what(kind, bytes) + whose + " before a barrier of the cluster: it may not have started",
             where);
    }
    add(owner.remote, relative(where));
  }
  const Region& shared = owner.shared;
  if (at < shared.begin || at + bytes > shared.begin + shared.bytes) {
    report_and_stop("out of bounds: " + what(kind, bytes) + " at " + place(shared, at), where);
  }
  touch_inside(shared, at, bytes, kind, where);
}

bool inside(const void* begin, size_t size, const unsigned char* at, size_t bytes) {
  const auto* const first = static_cast<const unsigned char*>(begin);
  return at >= first && at + bytes <= first + size;
}

}  // namespace

void touch(const void* address, size_t bytes, unsigned kind, const void* where) {
  if (bytes == 0) return;
  const auto* const at = static_cast<const unsigned char*>(address);
  if (at >= shared_memory && at < shared_memory + wave.size() * shared_pitch) {
    return touch_shared(at, bytes, kind, where);
  }
  if (const Region* const region = region_at(at)) {
    if (at + bytes > region->begin + region->bytes) {
      report_and_stop("out of bounds: " + what(kind, bytes) + " at " + place(*region, at), where);
    }
    return touch_inside(*region, at, bytes, kind, where);
  }
  if (at >= stacks && at < stacks_end) {
    report_and_stop("out of bounds: " + what(kind, bytes) + " of another thread's variables, or past the own ones",
                    where);
  }
  const auto number = reinterpret_cast<uintptr_t>(at);
  if (number >= image.begin && number < image.end) return;  // constants, threadIdx
  if (kind == kRead && inside(launching->arguments, launching->argument_bytes, at, bytes)) return;
  report_outside(at, bytes, kind, where);
}

}  // namespace cuda_on_cpu
