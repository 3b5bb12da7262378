// The machine of emulator.h: a block's threads are fibers, and a seed draws which of those that can run does.
#include "emulator.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <cfenv>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "fiber.h"
#include "racecheck.h"

namespace fastsparse::emulator {

Builtins builtins;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4 << 10;
constexpr size_t kRedZone = 64;  // around every allotment of shared memory
constexpr unsigned char kCanary = 0xc5;
constexpr unsigned char kPoison = 0xff;  // a NaN of every type, and an index out of every range

// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1) {
    for (int i = 0; i < 4; ++i) below(1);
  }
  unsigned below(unsigned limit) {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return unsigned((state_ * 0x2545f4914f6cdd1du >> 32) * limit >> 32);
  }

 private:
  uint64_t state_;
};

enum class State : uint8_t { ready, at_barrier, at_warp_op, exited };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Place place;  // where it waits
  Warp kind;
  unsigned mask;
  int source;
  uint64_t value;    // what it brings to the op, then what it gets
  Thread* leader;    // who came to the op first
  unsigned arrived;  // at a leader's op: the lanes
};

struct WarpState {
  unsigned waiting, exited;  // lanes
};

const char* name_of(Sync kind) {
  static const char* const names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  return names[int(kind)];
}

const char* name_of(Warp kind) {
  static const char* const names[] = {
      "__syncwarp",       "__shfl_sync",      "__shfl_up_sync",     "__shfl_down_sync",   "__shfl_xor_sync",
      "__any_sync",       "__all_sync",       "__ballot_sync",      "__match_any_sync",   "__match_all_sync",
      "__reduce_add_sync", "__reduce_add_sync", "__reduce_min_sync", "__reduce_min_sync", "__reduce_max_sync",
      "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync"};
  return names[int(kind)];
}

bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

std::string print(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string print(const char* format, va_list arguments) {
  char text[2048];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}
std::string print(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = print(format, arguments);
  va_end(arguments);
  return text;
}

std::string triple(unsigned x, unsigned y, unsigned z) { return print("(%u, %u, %u)", x, y, z); }
std::string at(const Place& place) {
  std::string_view file = place.file_name();
  return print("%s:%u", std::string(file.substr(file.rfind('/') + 1)).c_str(), unsigned(place.line()));
}

char* map(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

// The stacks of a block, each over a guard page; kept from launch to launch.
class Stacks {
 public:
  char* operator[](unsigned thread) {
    if (base_ == nullptr) {
      base_ = map(kMaxThreads * (kGuardBytes + kStackBytes));
      racecheck::ignore(base_, kMaxThreads * (kGuardBytes + kStackBytes));
    }
    char* guard = base_ + thread * (kGuardBytes + kStackBytes);
    for (; guarded_ <= thread; ++guarded_)
      mprotect(base_ + guarded_ * (kGuardBytes + kStackBytes), kGuardBytes, PROT_NONE);
    return guard + kGuardBytes;
  }
  bool guards(const void* address) const {
    size_t offset = size_t(static_cast<const char*>(address) - base_);
    return offset < guarded_ * (kGuardBytes + kStackBytes) && offset % (kGuardBytes + kStackBytes) < kGuardBytes;
  }

 private:
  char* base_ = nullptr;
  unsigned guarded_ = 0;
};

// A block's shared memory: dynamic first, then each static storage where the launch first asks for it.
class Shared {
 public:
  void begin_launch(size_t dynamic_bytes) {
    if (arena_ == nullptr) arena_ = map(kArenaBytes);
    unpoison(arena_, kArenaBytes);
    allotted_.clear();
    used_ = static_bytes_ = 0;
    dynamic_bytes_ = dynamic_bytes;
    poison(arena_, kArenaBytes);
    racecheck::begin_launch(arena_, kArenaBytes);
    dynamic_ = allot(nullptr, dynamic_bytes, 16);
  }

  void begin_block() {
    for (const auto& piece : allotted_) fresh(piece);
  }

  void* find(const void* key, size_t bytes, size_t alignment) {
    for (const auto& piece : allotted_)
      if (piece.key == key) return piece.memory;
    static_bytes_ = (static_bytes_ + alignment - 1) / alignment * alignment + bytes;
    if (static_bytes_ > kStaticSharedBytes)
      fail("static shared memory of %zu bytes: a block may have %zu", static_bytes_, kStaticSharedBytes);
    if (dynamic_bytes_ + static_bytes_ > kSharedBytes)
      fail("%zu bytes of dynamic and %zu of static shared memory: a block may have %zu in all", dynamic_bytes_,
           static_bytes_, kSharedBytes);
    return allot(key, bytes, alignment);
  }

  void* dynamic() const { return dynamic_; }

  // Whether every red zone is as it was laid.
  void check() const {
    for (const auto& piece : allotted_) {
      const char* zones[] = {piece.memory - kRedZone, piece.memory + piece.bytes};
      unpoison(zones[0], kRedZone);
      unpoison(zones[1], kRedZone);
      for (const char* zone : zones)
        for (size_t i = 0; i < kRedZone; ++i)
          if (static_cast<unsigned char>(zone[i]) != kCanary)
            fail("a write %td bytes from the beginning of %zu bytes of %s shared memory", zone + i - piece.memory,
                 piece.bytes, piece.key == nullptr ? "dynamic" : "static");
      poison(zones[0], kRedZone);
      poison(zones[1], kRedZone);
    }
  }

 private:
  struct Piece {
    const void* key;
    char* memory;
    size_t bytes;
  };
  static constexpr size_t kArenaBytes = 512 << 10;  // what a block may have, and red zones

  char* allot(const void* key, size_t bytes, size_t alignment) {
    used_ = (used_ + kRedZone + alignment - 1) / alignment * alignment;
    allotted_.push_back({key, arena_ + used_, bytes});
    const Piece& piece = allotted_.back();
    unpoison(piece.memory - kRedZone, kRedZone + bytes + kRedZone);
    std::memset(piece.memory - kRedZone, kCanary, kRedZone);
    std::memset(piece.memory + bytes, kCanary, kRedZone);
    poison(piece.memory - kRedZone, kRedZone);
    poison(piece.memory + bytes, kRedZone);
    used_ += bytes + kRedZone;
    racecheck::allot_shared(piece.memory, bytes);
    fresh(piece);
    return piece.memory;
  }

  static void fresh(const Piece& piece) { std::memset(piece.memory, kPoison, piece.bytes); }

  static void poison([[maybe_unused]] const char* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(memory, bytes);
#endif
  }
  static void unpoison([[maybe_unused]] const char* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, bytes);
#endif
  }

  char* arena_ = nullptr;
  size_t used_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0;
  void* dynamic_ = nullptr;
  std::vector<Piece> allotted_;
};

// The grid that runs, its block and that block's threads. One grid runs at a time.
struct Machine {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  uint64_t seed;
  Random random{0};
  unsigned stickiness;  // of 256 choices, how many go to who became ready last: few mix the threads, many let some run
                        // far ahead of others
  void (*body)(void*);
  void* context;

  unsigned count;                // of the block's threads
  Thread threads[kMaxThreads];
  WarpState warps[kMaxThreads / 32];
  std::vector<unsigned> ready;
  unsigned exited;
  Thread* current = nullptr;     // none: the host's code runs
  Fiber host;
  pthread_t runner;              // the host's thread
  std::string failure;

  unsigned met;                  // threads at the barrier, and how many bring true
  unsigned votes;
  Sync barrier;
  Place barrier_place;
  int barrier_result;

  Stacks stacks;
  Shared shared;

  unsigned number(const Thread& thread) const { return unsigned(&thread - threads); }

  // What runs next goes on; the caller, unless it is in `ready`, waits to be put there.
  void give_way(bool for_good = false) {
    Thread* me = current;
    if (ready.empty()) {
      enter(nullptr);
      me->fiber.switch_to(host, for_good);
      return;
    }
    unsigned n = unsigned(ready.size());
    unsigned choice = random.below(256) < stickiness ? n - 1 : random.below(n);
    Thread* next = &threads[ready[choice]];
    ready[choice] = ready.back();
    ready.pop_back();
    if (next == me) return;
    enter(next);
    me->fiber.switch_to(next->fiber, for_good);
  }

  void enter(Thread* thread) {
    current = thread;
    racecheck::thread_runs(thread == nullptr ? -1 : int(number(*thread)));
    if (thread != nullptr) builtins.thread = thread->index;
  }

  void wake(Thread& thread) {
    thread.state = State::ready;
    ready.push_back(number(thread));
  }

  void run_block(uint3 index);
  void explain_standstill();
  std::string where(const Thread& thread) const;
  std::string prefix() const;
};

Machine machine;
std::mutex one_at_a_time;

std::string Machine::prefix() const {
  return print("%s<<<%s, %s, %zu>>>", name, triple(grid.x, grid.y, grid.z).c_str(),
               triple(block.x, block.y, block.z).c_str(), shared_bytes);
}

std::string Machine::where(const Thread& thread) const {
  std::string who = "thread " + triple(thread.index.x, thread.index.y, thread.index.z);
  switch (thread.state) {
    case State::at_barrier: return who + " waits at " + name_of(barrier) + " (" + at(thread.place) + ")";
    case State::at_warp_op:
      return who + " waits at " + name_of(thread.kind) + print(" with mask 0x%08x (", thread.mask) + at(thread.place) +
             ")";
    case State::exited: return who + " has exited";
    default: return who + " runs";
  }
}

// First code of every thread's stack.
void run_thread() {
  Machine& m = machine;
  Thread& me = *m.current;
  me.fiber.arrived();
  m.body(m.context);
  me.state = State::exited;
  ++m.exited;
  unsigned number = m.number(me), first = number / 32 * 32, bit = 1u << number % 32;
  WarpState& warp = m.warps[number / 32];
  warp.exited |= bit;
  for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1)
    if (const Thread& other = m.threads[first + __builtin_ctz(rest)]; (other.mask & bit) != 0)
      fail("exits, but is named in a mask: %s", m.where(other).c_str());
  m.give_way(true);
}

void Machine::run_block(uint3 index) {
  builtins.block = index;
  ready.clear();
  met = votes = exited = 0;
  // Warps in a random order, and lanes within them.
  unsigned size = (count + 31) / 32, order[kMaxThreads / 32];
  for (unsigned w = 0; w < size; ++w) {
    unsigned other = random.below(w + 1);
    order[w] = order[other];
    order[other] = w;
    warps[w] = {};
  }
  for (unsigned w = 0; w < size; ++w) {
    unsigned begin = unsigned(ready.size());
    for (unsigned number = order[w] * 32; number < count && number < order[w] * 32 + 32; ++number) {
      ready.push_back(number);
      std::swap(ready.back(), ready[begin + random.below(unsigned(ready.size()) - begin)]);
    }
  }
  for (unsigned number = 0; number < count; ++number) {
    Thread& thread = threads[number];
    thread.index = {number % block.x, number / block.x % block.y, number / (block.x * block.y)};
    thread.state = State::ready;
    thread.fiber.prepare(run_thread, stacks[number], kStackBytes);
  }
  Thread* first = &threads[ready.back()];
  ready.pop_back();
  enter(first);
  host.switch_to(first->fiber);
  enter(nullptr);
  if (failure.empty() && exited < count) explain_standstill();
  if (failure.empty()) shared.check();
}

void Machine::explain_standstill() {
  if (met > 0 && met + exited == count) {
    const Thread *waits = nullptr, *gone = nullptr;
    for (unsigned i = 0; i < count; ++i) (threads[i].state == State::exited ? gone : waits) = &threads[i];
    fail("divergent barrier: %u of %u threads wait, %u have exited; %s, %s", met, count, exited, where(*waits).c_str(),
         where(*gone).c_str());
  }
  std::string text = "deadlock";
  const Thread* before = nullptr;
  int listed = 0;
  for (unsigned i = 0; i < count && listed < 6; ++i) {
    const Thread& thread = threads[i];
    if (before != nullptr && before->state == thread.state &&
        (thread.state == State::exited || (same(before->place, thread.place) && before->mask == thread.mask)))
      continue;
    text += (listed++ == 0 ? ": " : "; ") + where(thread);
    before = &thread;
  }
  fail("%s", text.c_str());
}

// The number of no-ops that __launch_bounds__ left in front of a kernel, 0 where it has none.
#if defined(__ELF__)
extern "C" {
extern const uintptr_t __start___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
extern const uintptr_t __stop___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
}
unsigned launch_bound(const void* kernel) {
#if defined(__x86_64__)
  using NoOp = unsigned char;
  constexpr NoOp no_op = 0x90;
#elif defined(__aarch64__)
  using NoOp = uint32_t;
  constexpr NoOp no_op = 0xd503201f;
#else
  return 0;
#endif
  auto* end = static_cast<const NoOp*>(kernel);
  const NoOp* begin = nullptr;  // the last mark before the kernel
  for (auto* entry = __start___patchable_function_entries; entry != __stop___patchable_function_entries; ++entry)
    if (auto* mark = reinterpret_cast<const NoOp*>(*entry); mark < end && mark > begin) begin = mark;
  if (begin == nullptr || end - begin > kMaxThreads) return 0;
  for (auto* at = begin; at < end; ++at)
    if (*at != no_op) return 0;
  return unsigned(end - begin);
}
#else
unsigned launch_bound(const void*) { return 0; }
#endif

#if !defined(__SANITIZE_ADDRESS__)
// Makes of a segmentation fault in a thread a failure like any other, while it lives. (The sanitizer has its own way.)
class FaultHandler {
 public:
  FaultHandler() {
    static char* const stack = map(kStackBytes);  // a thread's own may be what overflowed
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = kStackBytes;
    sigaltstack(&alternate, &stack_before_);
    struct sigaction action {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler is left for good by fail()
    sigaction(SIGSEGV, &action, &before_[0]);
    sigaction(SIGBUS, &action, &before_[1]);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &before_[0], nullptr);
    sigaction(SIGBUS, &before_[1], nullptr);
    if (!(stack_before_.ss_flags & SS_ONSTACK)) sigaltstack(&stack_before_, nullptr);
  }

 private:
  static void handle(int signal, siginfo_t* info, void*) {
    if (machine.current != nullptr && pthread_equal(machine.runner, pthread_self())) {
      if (machine.stacks.guards(info->si_addr)) fail("stack overflow: a thread has %zu bytes here", kStackBytes);
      fail("segmentation fault at %p", info->si_addr);
    }
    ::signal(signal, SIG_DFL);  // the host's own: faults again
  }

  stack_t stack_before_;
  struct sigaction before_[2];
};
#else
struct FaultHandler {
  ~FaultHandler() {}
};
#endif

uint64_t choose_seed() {
  if (const char* text = std::getenv("FASTSPARSE_EMULATOR_SEED"); text != nullptr && *text != 0) {
    char* end;
    uint64_t seed = std::strtoull(text, &end, 10);
    if (*end != 0)
      throw std::invalid_argument(print("FASTSPARSE_EMULATOR_SEED: must be a whole number, got '%s'", text));
    return seed;
  }
  static std::mt19937 seeds{std::random_device{}()};
  return seeds();
}

std::map<const void*, size_t> allowed;  // dynamic shared memory of kernels

void check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64 || threads > kMaxThreads)
    fail("a block of %s is %llu threads: at most (1024, 1024, 64) and 1024 in all are allowed",
         triple(block.x, block.y, block.z).c_str(), static_cast<unsigned long long>(threads));
  if (unsigned bound = launch_bound(kernel); bound != 0 && threads > bound)
    fail("a block of %llu threads: the kernel's __launch_bounds__ allows %u", static_cast<unsigned long long>(threads),
         bound);
  if (grid.x > 0x7fffffffu || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    fail("a grid of %s: at most (2147483647, 65535, 65535) is allowed", triple(grid.x, grid.y, grid.z).c_str());
  if (shared_bytes > kSharedBytes)
    fail("%zu bytes of dynamic shared memory: a block may have %zu", shared_bytes, kSharedBytes);
  if (size_t most = allowed.contains(kernel) ? allowed[kernel] : kStaticSharedBytes; shared_bytes > most)
    fail("%zu bytes of dynamic shared memory: cudaFuncSetAttribute lets the kernel have %zu", shared_bytes, most);
}

}  // namespace
}  // namespace fastsparse::emulator

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  using namespace fastsparse::emulator;
  std::lock_guard lock(one_at_a_time);
  size_t& most = allowed[kernel];
  if (size_t(value) < most)
    throw std::runtime_error(print("a kernel that may have %zu bytes of dynamic shared memory is left %d", most, value));
  most = size_t(value);
  return cudaSuccess;
}

namespace fastsparse::emulator {

void fail(const char* format, ...) {
  Machine& m = machine;
  va_list arguments;
  va_start(arguments, format);
  std::string text = m.prefix();
  if (m.current != nullptr) {
    const uint3 &b = builtins.block, &t = m.current->index;
    text += ", block " + triple(b.x, b.y, b.z) + ", thread " + triple(t.x, t.y, t.z);
  }
  text += ": " + print(format, arguments) + print(" (FASTSPARSE_EMULATOR_SEED=%llu)", (unsigned long long)m.seed);
  va_end(arguments);
  if (m.current == nullptr) throw std::runtime_error(text);
  m.failure = std::move(text);
  m.ready.clear();
  Fiber& here = m.current->fiber;
  m.enter(nullptr);
  here.switch_to(m.host, true);
  std::abort();
}

// A GPU computes as it does, whatever the mode of the host's floating-point unit.
class OrdinaryArithmetic {
 public:
  OrdinaryArithmetic() {
    std::fegetenv(&host_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~OrdinaryArithmetic() { std::fesetenv(&host_); }

 private:
  std::fenv_t host_;
};

void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*),
         void* context) {
  if (uint64_t(grid.x) * grid.y * grid.z == 0 || block.x * block.y * block.z == 0) return;
  std::lock_guard lock(one_at_a_time);
  Machine& m = machine;
  m.name = name;
  m.grid = grid;
  m.block = block;
  m.shared_bytes = shared_bytes;
  m.seed = choose_seed();
  m.random = Random(m.seed);
  m.failure.clear();
  check_launch(kernel, grid, block, shared_bytes);

  static constexpr unsigned stickiness[] = {0, 128, 248};
  m.stickiness = stickiness[m.random.below(3)];
  m.body = thread;
  m.context = context;
  m.count = block.x * block.y * block.z;
  builtins.threads = block;
  builtins.blocks = grid;
  m.runner = pthread_self();
  FaultHandler handler;
  OrdinaryArithmetic arithmetic;
  m.shared.begin_launch(shared_bytes);
  // Blocks in the order of a random full cycle through their numbers.
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  unsigned range = unsigned(std::min<uint64_t>(blocks, ~0u));
  uint64_t number = m.random.below(range), step = 1 + m.random.below(range);
  while (std::gcd(step, blocks) != 1) ++step;
  for (uint64_t done = 0; done < blocks && m.failure.empty(); ++done, number = (number + step) % blocks) {
    if (done > 0) m.shared.begin_block();
    uint3 index{unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    racecheck::begin_block(index, m.count);
    m.run_block(index);
  }
  if (!m.failure.empty()) throw std::runtime_error(m.failure);
}

int barrier(Sync kind, bool predicate, Place place) {
  Machine& m = machine;
  if (m.met == 0) {
    m.barrier = kind;
    m.barrier_place = place;
  } else if (kind != m.barrier || !same(place, m.barrier_place)) {
    fail("divergent barrier: at %s (%s) while %u threads wait at %s (%s)", name_of(kind), at(place).c_str(), m.met,
         name_of(m.barrier), at(m.barrier_place).c_str());
  }
  m.votes += predicate;
  m.current->state = State::at_barrier;
  m.current->place = place;
  if (++m.met == m.count) {
    m.barrier_result = kind == Sync::threads_or    ? m.votes != 0
                       : kind == Sync::threads_and ? m.votes == m.count
                                                   : int(m.votes);
    m.met = m.votes = 0;
    racecheck::all_threads_met();
    for (unsigned i = 0; i < m.count; ++i) m.wake(m.threads[i]);
  }
  m.give_way();
  return m.barrier_result;  // still this barrier's: the next can't complete without this thread
}

unsigned lane() { return machine.number(*machine.current) % 32; }

// As the PTX instruction shfl has it: a lane out of the segment of `width` lanes leaves the caller its own value, but
// xor may read from an earlier segment.
int shuffle_source(Warp kind, int operand, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("%s: width must be a power of two up to 32, got %d",
                                                                  name_of(kind), width);
  int self = int(lane()), first = self & ~(width - 1), last = first + width - 1, b = operand & 31;
  int source = kind == Warp::shfl        ? first | (b & (width - 1))
               : kind == Warp::shfl_up   ? self - b
               : kind == Warp::shfl_down ? self + b
                                         : self ^ b;
  if (kind == Warp::shfl_up) return source < first ? self : source;
  return source > last ? self : source;
}

namespace {

// Gives every lane of the mask what the op makes of all their values.
void combine(Thread* lanes, Warp kind, unsigned mask) {
  uint64_t before[32], all = 0;
  bool first = true;
  unsigned votes = 0;
  bool equal = true;
  uint64_t one = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    uint64_t value = before[i] = lanes[i].value;
    unsigned a = unsigned(all), b = unsigned(value);
    if (b != 0) votes |= 1u << i;
    if (first) one = all = value;
    equal = equal && value == one;
    if (!first) switch (kind) {
      case Warp::add: case Warp::add_signed: all = unsigned(a + b); break;
      case Warp::min: all = std::min(a, b); break;
      case Warp::max: all = std::max(a, b); break;
      case Warp::min_signed: all = unsigned(std::min(int(a), int(b))); break;
      case Warp::max_signed: all = unsigned(std::max(int(a), int(b))); break;
      case Warp::bit_and: all = a & b; break;
      case Warp::bit_or: all = a | b; break;
      case Warp::bit_xor: all = a ^ b; break;
      default: break;
    }
    first = false;
  }
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    uint64_t& out = lanes[i].value;
    switch (kind) {
      case Warp::sync: break;
      case Warp::shfl: case Warp::shfl_up: case Warp::shfl_down: case Warp::shfl_xor:
        out = (mask >> lanes[i].source & 1) != 0 ? before[lanes[i].source] : ~uint64_t{0};  // undefined: all ones
        break;
      case Warp::any: out = votes != 0; break;
      case Warp::all: out = votes == mask; break;
      case Warp::ballot: out = votes; break;
      case Warp::match_any: {
        unsigned equals = 0;
        for (unsigned j = 0; j < 32; ++j)
          if ((mask >> j & 1) != 0 && before[j] == before[i]) equals |= 1u << j;
        out = equals;
        break;
      }
      case Warp::match_all: out = equal ? mask : 0; break;
      default: out = all; break;
    }
  }
}

}  // namespace

uint64_t collective(Warp kind, unsigned mask, uint64_t value, int source, Place place) {
  Machine& m = machine;
  Thread& me = *m.current;
  unsigned number = m.number(me), first = number / 32 * 32, self = number % 32, bit = 1u << self;
  unsigned present = std::min(32u, m.count - first);
  Thread* lanes = &m.threads[first];
  WarpState& warp = m.warps[first / 32];
  if ((mask & bit) == 0)
    fail("%s (%s): the caller, lane %u, isn't in its mask 0x%08x", name_of(kind), at(place).c_str(), self, mask);
  if (present < 32 && mask >> present != 0)
    fail("%s (%s): mask 0x%08x names lanes of a warp that has %u", name_of(kind), at(place).c_str(), mask, present);
  if (unsigned gone = mask & warp.exited; gone != 0)
    fail("%s (%s): mask 0x%08x names a lane that is gone: %s", name_of(kind), at(place).c_str(), mask,
         m.where(lanes[__builtin_ctz(gone)]).c_str());
  // Whoever waits, is named here and names this lane must wait at the same op; the first to come counts those that are
  // there. (A lane that waits for others than this one may yet come.)
  Thread* leader = &me;
  for (unsigned rest = mask & warp.waiting; rest != 0; rest &= rest - 1) {
    const Thread& other = lanes[__builtin_ctz(rest)];
    if ((other.mask & bit) == 0) continue;
    if (other.kind != kind || other.mask != mask || (kind != Warp::sync && !same(other.place, place)))
      fail("divergent warp: at %s with mask 0x%08x (%s) while %s", name_of(kind), mask, at(place).c_str(),
           m.where(other).c_str());
    leader = other.leader;
    break;
  }
  if (leader == &me) me.arrived = 0;
  leader->arrived |= bit;
  warp.waiting |= bit;
  me.state = State::at_warp_op;
  me.kind = kind;
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.place = place;
  me.leader = leader;
  if (leader->arrived == mask) {
    combine(lanes, kind, mask);
    if (kind == Warp::sync) racecheck::lanes_met(first / 32, mask);
    warp.waiting &= ~mask;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) m.wake(lanes[__builtin_ctz(rest)]);
  }
  m.give_way();
  return me.value;
}

void at_atomic(const void* address, size_t bytes) {
  Machine& m = machine;
  if (m.random.below(2) == 0) {
    m.ready.push_back(m.number(*m.current));
    m.give_way();
  }
  if (bytes > 0) racecheck::atomic_access(address, bytes, __builtin_return_address(0));
}

void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
    fail("misaligned: an access of %zu bytes at %p", alignment, address);
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  return machine.shared.find(key, bytes, alignment);
}
void* dynamic_shared_memory() { return machine.shared.dynamic(); }

}  // namespace fastsparse::emulator
