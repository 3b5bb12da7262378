// Finds data races exactly: two accesses to the same bytes, one of them a write and not both atomic, that no barrier
// orders. Also reads of shared memory that no thread of the block wrote, and accesses beyond what was allotted of it.
//
// Device code is compiled with -fsanitize=thread, for the calls that this leaves at every load and store; they are
// answered here. The order is CUDA's: __syncthreads orders all accesses of the block's threads, __syncwarp those of the
// lanes that meet there; shuffles, votes and atomics order nothing, and nothing is ordered between blocks of one grid:
// a protocol of flags and fences would be reported.
//
// Every word of memory has a cell with what was last done to it, each access stamped with the epoch (the number of
// barriers so far, over all launches) and, within an epoch, with the lane's clock, which __syncwarp advances; each lane
// knows up to which clock it has met each other lane of its warp (vector clocks; as in FastTrack, Flanagan and Freund,
// PLDI 2009, one stamp of the last access is enough where accesses are ordered).
#include "racecheck.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastsparse::emulator::racecheck {

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 32;
constexpr uintptr_t kPage = 4096;
constexpr size_t kMostShadow = size_t{512} << 20;

struct Stamp {
  uint32_t epoch = 0;
  uint32_t clock = 0;
  int32_t pc = 0;  // from the anchor
  uint16_t thread = 0;
};

// Accesses that may happen at the same time: reads, or atomics. Within the present epoch all that a later access may
// have to be ordered after is the last one, or else the lanes of one warp and any thread of another; of earlier blocks
// of the grid, whether there was one.
struct Accesses {
  Stamp last;
  uint32_t foreign = 0;  // an epoch of an earlier block of this launch
  uint32_t crowd = 0;    // in crowds, if last.epoch is now; 0: none
};

struct Crowd {
  unsigned warp;
  std::array<Stamp, kLanes> lanes;
  Stamp other;
};

struct Cell {
  Stamp write;
  Accesses reads, atomics;
};

// The cells of 4096 bytes, each of 4 bytes until a smaller access comes.
struct Page {
  int shift = 2;
  std::vector<Cell> cells = std::vector<Cell>(kPage >> 2);
};

struct Region {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t address) const { return address - begin < end - begin; }
};

thread_local int running = -1;  // threads of the host may run instrumented code beside the machine

uint32_t now = 1, block_epoch = 1, launch_epoch = 1;
uint32_t clocks[kWarps][kLanes][kLanes];
std::vector<Crowd> crowds(1);
std::vector<std::pair<uint32_t, uint3>> blocks;  // of this launch, by first epoch
Region stacks, arena;
std::vector<Region> allotted;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
size_t shadow_bytes;
struct Recent { uintptr_t number = ~uintptr_t{0}; Page* page; };
std::array<Recent, 1024> recent;

const char anchor = 0;

Page& page_of(uintptr_t address) {
  uintptr_t number = address / kPage;
  Recent& known = recent[number % recent.size()];
  if (known.number != number) {
    auto& page = pages[number];
    if (page == nullptr) {
      page = std::make_unique<Page>();
      shadow_bytes += page->cells.size() * sizeof(Cell);
    }
    known = {number, page.get()};
  }
  return *known.page;
}

void forget_all() {
  pages.clear();
  recent.fill({});
  shadow_bytes = 0;
}

uint32_t copy_of(uint32_t crowd) {
  crowds.push_back(Crowd(crowds[crowd]));
  return uint32_t(crowds.size() - 1);
}

void refine(Page& page, int shift) {
  size_t copies = size_t{1} << (page.shift - shift);
  std::vector<Cell> finer;
  finer.reserve(page.cells.size() * copies);
  for (const Cell& cell : page.cells)
    for (size_t copy = 0; copy < copies; ++copy) {
      finer.push_back(cell);
      for (Accesses* accesses : {&finer.back().reads, &finer.back().atomics})
        if (copy > 0 && accesses->crowd != 0 && accesses->last.epoch == now) accesses->crowd = copy_of(accesses->crowd);
    }
  shadow_bytes += (finer.size() - page.cells.size()) * sizeof(Cell);
  page.cells = std::move(finer);
  page.shift = shift;
}

// One access by the thread that runs.
struct Access {
  uintptr_t address;
  size_t bytes;
  const void* pc;
  const char* what;
  bool shared;
  Stamp stamp;

  unsigned warp() const { return stamp.thread / kLanes; }

  // Whether what was done is certain to have been done before.
  bool after(const Stamp& other) const {
    if (other.epoch < launch_epoch) return true;
    if (other.epoch < block_epoch) return shared;  // an earlier block's shared memory is none of this one's
    if (other.epoch < now || other.thread == stamp.thread) return true;
    if (other.thread / kLanes != warp()) return false;
    return clocks[warp()][stamp.thread % kLanes][other.thread % kLanes] >= other.clock;
  }

  bool after(const Accesses& accesses, Stamp& culprit) const {
    if (!shared && accesses.foreign >= launch_epoch && accesses.foreign < block_epoch) {
      culprit = {accesses.foreign, 0, 0, 0};
      return false;
    }
    culprit = accesses.last;
    if (accesses.last.epoch != now || accesses.crowd == 0) return after(accesses.last);
    const Crowd& crowd = crowds[accesses.crowd];
    for (const Stamp& stamp : crowd.lanes)
      if (stamp.epoch == now && !after(stamp)) return culprit = stamp, false;
    return culprit = crowd.other, crowd.other.epoch != now || after(crowd.other);
  }

  // Remembers this one among the others, none of which it must be ordered with.
  void join(Accesses& accesses) const {
    Stamp& last = accesses.last;
    if (last.epoch == now && accesses.crowd == 0 && !after(last)) {
      crowds.emplace_back();
      accesses.crowd = uint32_t(crowds.size() - 1);
      crowds.back().warp = last.thread / kLanes;
      crowds.back().lanes[last.thread % kLanes] = last;
    }
    if (last.epoch != now) {
      if (last.epoch >= launch_epoch && last.epoch < block_epoch) accesses.foreign = last.epoch;
      accesses.crowd = 0;
    }
    if (accesses.crowd != 0) {
      Crowd& crowd = crowds[accesses.crowd];
      (crowd.warp == warp() ? crowd.lanes[stamp.thread % kLanes] : crowd.other) = stamp;
    }
    last = stamp;
  }
};

std::string line_of(const void* pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0) return "?";
  char command[512], text[256];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' %#zx 2> /dev/null", info.dli_fname,
                size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1);
  std::string lines;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(text, sizeof text, pipe) != nullptr) {
      std::string line(text, std::strcspn(text, "\n ")), file = line.substr(line.rfind('/') + 1);
      if (file.find("emulator.h") == 0 || file.find("device.cuh") == 0 || file.find('?') != file.npos) continue;
      if (lines.find(file) == lines.npos) lines += (lines.empty() ? "" : " < ") + file;
    }
    pclose(pipe);
  }
  if (!lines.empty()) return lines;
  std::snprintf(text, sizeof text, "%s+%#zx", info.dli_sname != nullptr ? info.dli_sname : info.dli_fname,
                size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_saddr)));
  return text;
}

std::string place_of(uintptr_t address) {
  char text[96];
  for (const Region& region : allotted)
    if (region.holds(address)) {
      std::snprintf(text, sizeof text, "byte %zu of %zu of %s shared memory", size_t(address - region.begin),
                    size_t(region.end - region.begin), &region == &allotted[0] ? "dynamic" : "static");
      return text;
    }
  std::snprintf(text, sizeof text, "%s memory at %p", arena.holds(address) ? "unallotted shared" : "global",
                reinterpret_cast<void*>(address));
  return text;
}

std::string thread_of(const Stamp& stamp) {
  auto next = std::upper_bound(blocks.begin(), blocks.end(), stamp.epoch,
                               [](uint32_t epoch, const auto& block) { return epoch < block.first; });
  uint3 block = (next - 1)->second;
  char text[128];
  if (stamp.epoch < block_epoch) {
    std::snprintf(text, sizeof text, "block (%u, %u, %u)", block.x, block.y, block.z);
  } else {
    unsigned x = builtins.threads.x, y = builtins.threads.y, thread = stamp.thread;
    std::snprintf(text, sizeof text, "thread (%u, %u, %u)", thread % x, thread / x % y, thread / (x * y));
  }
  return text;
}

[[noreturn]] __attribute__((noinline, cold)) void report_race(const Access& access, uintptr_t address,
                                                              const Stamp& other, const char* what) {
  const void* pc = other.pc == 0 ? nullptr : &anchor + other.pc;
  fail("race: %s of %zu bytes, %s (%s), and %s by %s (%s), which nothing orders", access.what, access.bytes,
       place_of(address).c_str(), line_of(access.pc).c_str(), what, thread_of(other).c_str(), line_of(pc).c_str());
}

enum class Kind { read, write, atomic };

__attribute__((noinline)) void check(Kind kind, uintptr_t address, size_t bytes, const void* pc) {
  static const char* const names[] = {"a read", "a write", "an atomic"};
  Access access{address, bytes, pc, names[int(kind)], arena.holds(address), {}};
  access.stamp = {now, clocks[unsigned(running) / kLanes][running % kLanes][running % kLanes],
                  int32_t(static_cast<const char*>(pc) - &anchor), uint16_t(running)};
  if (access.shared && std::none_of(allotted.begin(), allotted.end(), [&](const Region& region) {
        return region.begin <= address && address + bytes <= region.end;
      }))
    fail("out of bounds: %s of %zu bytes, %s (%s)", access.what, bytes, place_of(address).c_str(), line_of(pc).c_str());

  uintptr_t end = address + bytes;
  while (address < end) {
    Page& page = page_of(address);
    uintptr_t page_end = std::min(end, (address / kPage + 1) * kPage), mask = (uintptr_t{1} << page.shift) - 1;
    if (((address | page_end) & mask) != 0) refine(page, std::min(__builtin_ctzll(address | page_end), 2));
    for (; address < page_end; address += uintptr_t{1} << page.shift) {
      Cell& cell = page.cells[address % kPage >> page.shift];
      Stamp culprit;
      if (access.shared && kind != Kind::write && cell.write.epoch < block_epoch)
        fail("%s of %zu bytes, %s, that no thread of the block has written (%s)", access.what, bytes,
             place_of(address).c_str(), line_of(pc).c_str());
      if (!access.after(cell.write)) report_race(access, address, cell.write, "a write");
      if (kind != Kind::atomic && !access.after(cell.atomics, culprit))
        report_race(access, address, culprit, "an atomic");
      if (kind != Kind::read && !access.after(cell.reads, culprit)) report_race(access, address, culprit, "a read");
      switch (kind) {
        case Kind::read: access.join(cell.reads); break;
        case Kind::atomic: access.join(cell.atomics); break;
        case Kind::write: cell = {access.stamp, {}, {}}; break;
      }
    }
  }
}

inline void plain(Kind kind, const volatile void* memory, size_t bytes, const void* pc) {
  if (running < 0) return;
  uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  if (stacks.holds(address) || address - reinterpret_cast<uintptr_t>(&builtins) < sizeof builtins) return;
  check(kind, address, bytes, pc);
}

Region region(const void* memory, size_t bytes) {
  uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  return {begin, begin + bytes};
}

}  // namespace

void ignore(const void* memory, size_t bytes) { stacks = region(memory, bytes); }

void begin_launch(const void* shared_arena, size_t bytes) {
  arena = region(shared_arena, bytes);
  allotted.clear();
  if (shadow_bytes > kMostShadow || now > 1u << 31) forget_all();
  if (now > 1u << 31) now = 1;
  launch_epoch = block_epoch = ++now;
  blocks.clear();
}

void allot_shared(const char* memory, size_t bytes) { allotted.push_back(region(memory, bytes)); }

void begin_block(uint3 index, unsigned threads) {
  block_epoch = ++now;
  blocks.push_back({now, index});
  crowds.resize(1);
  for (unsigned warp = 0; warp * kLanes < threads; ++warp) {
    std::memset(clocks[warp], 0, sizeof clocks[warp]);
    for (int lane = 0; lane < kLanes; ++lane) clocks[warp][lane][lane] = 1;
  }
}

void thread_runs(int number) { running = number; }

void all_threads_met() {
  ++now;
  crowds.resize(1);
}

void lanes_met(unsigned warp, unsigned mask) {
  auto& known = clocks[warp];
  uint32_t joined[kLanes] = {};
  for (unsigned rest = mask; rest != 0; rest &= rest - 1)
    for (int lane = 0; lane < kLanes; ++lane)
      joined[lane] = std::max(joined[lane], known[__builtin_ctz(rest)][lane]);
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    std::memcpy(known[lane], joined, sizeof joined);
    ++known[lane][lane];
  }
}

void atomic_access(const volatile void* address, size_t bytes, const void* pc) {
  check(Kind::atomic, reinterpret_cast<uintptr_t>(address), bytes, pc);
}

}  // namespace fastsparse::emulator::racecheck

// ---- what the compiler calls ----

extern "C" {

#pragma GCC visibility push(hidden)

using fastsparse::emulator::racecheck::Kind;
using fastsparse::emulator::racecheck::plain;

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define FASTSPARSE_ACCESS(name, bytes)                                                                        \
  void __tsan_read##name(void* address) { plain(Kind::read, address, bytes, __builtin_return_address(0)); }   \
  void __tsan_write##name(void* address) { plain(Kind::write, address, bytes, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##name(const void* address) {                                                     \
    plain(Kind::read, address, bytes, __builtin_return_address(0));                                           \
  }                                                                                                           \
  void __tsan_unaligned_write##name(void* address) { plain(Kind::write, address, bytes, __builtin_return_address(0)); }
FASTSPARSE_ACCESS(1, 1)
FASTSPARSE_ACCESS(2, 2)
FASTSPARSE_ACCESS(4, 4)
FASTSPARSE_ACCESS(8, 8)
FASTSPARSE_ACCESS(16, 16)
void __tsan_read_range(void* address, size_t bytes) {
  plain(Kind::read, address, bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  plain(Kind::write, address, bytes, __builtin_return_address(0));
}

// Of the host's code (counts of references); device code has CUDA's atomics alone.
#define FASTSPARSE_ATOMICS(bits, T)                                                                                   \
  T __tsan_atomic##bits##_load(const volatile T* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }             \
  void __tsan_atomic##bits##_store(volatile T* a, T v, int) { __atomic_store_n(a, v, __ATOMIC_SEQ_CST); }             \
  T __tsan_atomic##bits##_exchange(volatile T* a, T v, int) { return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_add(volatile T* a, T v, int) { return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_sub(volatile T* a, T v, int) { return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_and(volatile T* a, T v, int) { return __atomic_fetch_and(a, v, __ATOMIC_SEQ_CST); }   \
  T __tsan_atomic##bits##_fetch_or(volatile T* a, T v, int) { return __atomic_fetch_or(a, v, __ATOMIC_SEQ_CST); }     \
  T __tsan_atomic##bits##_fetch_xor(volatile T* a, T v, int) { return __atomic_fetch_xor(a, v, __ATOMIC_SEQ_CST); }   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* c, T v, int, int) {                             \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* c, T v, int, int) {                               \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                           \
  }
FASTSPARSE_ATOMICS(8, unsigned char)
FASTSPARSE_ATOMICS(16, unsigned short)
FASTSPARSE_ATOMICS(32, unsigned)
FASTSPARSE_ATOMICS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

#pragma GCC visibility pop
}
