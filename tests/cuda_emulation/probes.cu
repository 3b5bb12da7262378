// Kernels that show what the emulator does: one for every primitive, and one for every kind of bug that it must catch.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/tensor_cores.cuh"

namespace fastsparse::cuda {
namespace {

// What every probe is given: 64-bit words in and out, and three numbers.
struct Job {
  const uint64_t* in;
  uint64_t* out;
  int64_t a, b, c;
};

__device__ int64_t thread_number() {
  int64_t in_block = threadIdx.x + int64_t(blockDim.x) * (threadIdx.y + int64_t(blockDim.y) * threadIdx.z);
  int64_t block = blockIdx.x + int64_t(gridDim.x) * (blockIdx.y + int64_t(gridDim.y) * blockIdx.z);
  return block * blockDim.x * blockDim.y * blockDim.z + in_block;
}

template <typename T> __device__ T as(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}
template <typename T> __device__ uint64_t word(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

// ---- primitives ----

__global__ void indices(Job job) {
  uint64_t* out = job.out + 6 * thread_number();
  out[0] = threadIdx.x, out[1] = threadIdx.y, out[2] = threadIdx.z;
  out[3] = blockIdx.x, out[4] = blockIdx.y, out[5] = blockIdx.z;
}

// a: the operand, b: the width, c: the mask, of which only the lanes named take part.
template <typename T> __global__ void shuffles(Job job) {
  unsigned mask = unsigned(job.c), t = threadIdx.x;
  if ((mask >> t % kWarp & 1) == 0) return;
  T mine = as<T>(job.in[t]);
  int width = int(job.b);
  uint64_t* out = job.out + 5 * t;
  out[0] = word(__shfl_sync(mask, mine, int(job.a), width));
  out[1] = word(__shfl_up_sync(mask, mine, unsigned(job.a), width));
  out[2] = word(__shfl_down_sync(mask, mine, unsigned(job.a), width));
  out[3] = word(__shfl_xor_sync(mask, mine, int(job.a), width));
  out[4] = word(__shfl_sync(mask, mine, int(t * t + 1), width));  // every lane from another
}

__global__ void votes(Job job) {
  unsigned mask = unsigned(job.c), t = threadIdx.x;
  if ((mask >> t % kWarp & 1) == 0) return;
  unsigned mine = unsigned(job.in[t]);
  uint64_t* out = job.out + 14 * t;
  out[0] = unsigned(__any_sync(mask, int(mine)));
  out[1] = unsigned(__all_sync(mask, int(mine)));
  out[2] = __ballot_sync(mask, int(mine));
  out[3] = __match_any_sync(mask, mine);
  int agree;
  out[4] = __match_all_sync(mask, mine, &agree);
  out[4] |= uint64_t(unsigned(agree)) << 32;
  out[5] = __reduce_add_sync(mask, mine);
  out[6] = __reduce_min_sync(mask, mine);
  out[7] = __reduce_max_sync(mask, mine);
  out[8] = __reduce_and_sync(mask, mine);
  out[9] = __reduce_or_sync(mask, mine);
  out[10] = __reduce_xor_sync(mask, mine);
  out[11] = unsigned(__reduce_add_sync(mask, int(mine)));
  out[12] = unsigned(__reduce_min_sync(mask, int(mine)));
  out[13] = unsigned(__reduce_max_sync(mask, int(mine)));
}

// A lane's words are those of a, b and c.
__global__ void tensor_core(Job job) {
  const uint64_t* in = job.in + 10 * threadIdx.x;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = uint32_t(in[i]), c[i] = as<float>(in[6 + i]);
  for (int i = 0; i < 2; ++i) b[i] = uint32_t(in[4 + i]);
  multiply_add(c, a, b);
  for (int i = 0; i < 4; ++i) job.out[4 * threadIdx.x + i] = word(c[i]);
}

__global__ void barriers(Job job) {
  int mine = int(job.in[thread_number()]);
  uint64_t* out = job.out + 4 * thread_number();
  out[0] = unsigned(__syncthreads_count(mine));
  out[1] = unsigned(__syncthreads_or(mine));
  out[2] = unsigned(__syncthreads_and(mine));
  __syncthreads();
  out[3] = unsigned(__syncthreads_count(!mine));
}

// Every thread on one word of each, in shared memory and then in global.
template <typename T> __device__ void integer_atomics(Job job, T* memory, T mine) {
  uint64_t* before = job.out + 16 + 2 * threadIdx.x;
  before[0] = word(atomicAdd(&memory[0], mine));
  atomicMax(&memory[1], mine);
  atomicMin(&memory[2], mine);
  before[1] = word(atomicExch(&memory[3], mine));
  atomicAnd(&memory[4], mine);
  atomicOr(&memory[5], mine);
  atomicXor(&memory[6], mine);
  for (T seen = 0;;) {  // adds by compare-and-swap
    T was = atomicCAS(&memory[7], seen, seen + mine);
    if (was == seen) break;
    seen = was;
  }
}
template <typename T> __global__ void atomics(Job job) {
  struct Storage { T words[8]; };
  T* memory = shared_storage<Storage>().words;
  T* global = reinterpret_cast<T*>(job.out + 8);
  if (threadIdx.x < 8)  // the least and all bits begin with all that they can lose
    memory[threadIdx.x] = global[threadIdx.x] = threadIdx.x == 2 || threadIdx.x == 4 ? ~T(0) >> 1 : 0;
  __syncthreads();
  T mine = T(job.in[threadIdx.x]);
  integer_atomics(job, job.a != 0 ? memory : global, mine);
  __syncthreads();
  if (threadIdx.x < 8) job.out[threadIdx.x] = word(job.a != 0 ? memory[threadIdx.x] : global[threadIdx.x]);
}

template <typename T> __global__ void float_atomics(Job job) {
  T* sum = &shared_storage<T>();
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  atomicAdd(sum, T(job.in[threadIdx.x]));
  __syncthreads();
  if (threadIdx.x == 0) job.out[0] = uint64_t(*sum);
}

__global__ void other_atomics(Job job) {
  struct Storage { unsigned up, down; int less; };
  auto& shared = shared_storage<Storage>();
  if (threadIdx.x == 0) shared.up = shared.down = 0, shared.less = 0;
  __syncthreads();
  atomicInc(&shared.up, unsigned(job.a));
  atomicDec(&shared.down, unsigned(job.a));
  atomicSub(&shared.less, 3);
  __syncthreads();
  if (threadIdx.x == 0) job.out[0] = shared.up, job.out[1] = shared.down, job.out[2] = unsigned(shared.less);
}

struct First { uint64_t words[40]; };
struct Second { unsigned char bytes[256]; };
__device__ First& through_a_function() { return shared_storage<First>(); }

// Reverses a block's words by way of static and of dynamic shared memory; one type is one memory.
__global__ void shared_memory(Job job) {
  int t = int(threadIdx.x), n = int(blockDim.x);
  auto& first = shared_storage<First>();
  auto& second = shared_storage<Second>();
  auto* dynamic = dynamic_shared<uint64_t>();
  first.words[t] = job.in[t];
  dynamic[t] = job.in[t] + 1;
  second.bytes[t] = static_cast<unsigned char>(t);
  __syncthreads();
  job.out[t] = through_a_function().words[n - 1 - t] + dynamic[n - 1 - t] + second.bytes[(t + 1) % n];
  job.out[n + t] = (reinterpret_cast<uintptr_t>(&first) | reinterpret_cast<uintptr_t>(&second) |
                    reinterpret_cast<uintptr_t>(dynamic)) % 16;
}

__global__ void bits(Job job) {
  int64_t t = thread_number();
  uint64_t value = job.in[t], *out = job.out + 10 * t;
  unsigned low = unsigned(value);
  out[0] = unsigned(__popc(low)), out[1] = unsigned(__popcll(value));
  out[2] = unsigned(__ffs(int(low))), out[3] = unsigned(__ffsll(static_cast<long long>(value)));
  out[4] = unsigned(__clz(int(low))), out[5] = unsigned(__clzll(static_cast<long long>(value)));
  out[6] = __brev(low), out[7] = __brevll(value);
  out[8] = __umulhi(low, unsigned(value >> 32)), out[9] = __umul64hi(value, value ^ 0x123456789abcdef0);
}

__global__ void rounding(Job job) {
  int64_t t = thread_number();
  float a = as<float>(job.in[t]), b = as<float>(job.in[t] >> 32);
  uint64_t* out = job.out + 6 * t;
  out[0] = word(__fadd_ru(a, b)), out[1] = word(__fadd_rd(a, b));
  out[2] = word(__fsub_ru(a, b)), out[3] = word(__fsub_rd(a, b));
  out[4] = word(__fmul_ru(a, b)), out[5] = word(__fmul_rd(a, b));
}

__global__ void conversions(Job job) {
  int64_t t = thread_number();
  float value = as<float>(job.in[t]);
  uint16_t half = uint16_t(job.in[t] >> 32);
  uint64_t* out = job.out + 4 * t;
  out[0] = narrow<bf16>(value).bits, out[1] = narrow<f16>(value).bits;
  out[2] = word(widen(bf16{half})), out[3] = word(widen(f16{half}));
}

__global__ void extremes(Job job) {
  float nan = __uint_as_float(0x7fc00000);
  job.out[0] = uint64_t(min(-1, 2)), job.out[1] = max(-1, 2u), job.out[2] = uint64_t(min(-5l, 7l));
  job.out[3] = word(max(nan, 2.0f)), job.out[4] = word(min(1.5f, nan)), job.out[5] = word(max(1.5, 2.5f));
  job.out[6] = max(3ull, 4ull), job.out[7] = uint64_t(min(-9ll, 4ll));
}

// a: how many bytes off a packet's boundary.
__global__ void packets(Job job) {
  auto* from = reinterpret_cast<const float*>(reinterpret_cast<const char*>(job.in) + job.a);
  store_packet(reinterpret_cast<float*>(job.out) + 4 * threadIdx.x, load_packet(from + 4 * threadIdx.x));
}

// The order in which threads came, and in which blocks did.
__global__ void order(Job job) {
  auto* tickets = reinterpret_cast<unsigned long long*>(job.out);
  job.out[1 + thread_number()] = atomicAdd(tickets, 1ull);
}

// ---- programs without a race ----

struct Partial { uint64_t words[1024]; };

// A sum by halving, with its barriers.
__global__ void tree_sum(Job job) {
  uint64_t* partial = shared_storage<Partial>().words;
  partial[threadIdx.x] = job.in[threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) job.out[blockIdx.x] = partial[0];
}

// Groups of a lanes pass words on through shared memory, each group at its own pace.
__global__ void groups_of_lanes(Job job) {
  uint64_t* words = shared_storage<Partial>().words;
  unsigned lanes = unsigned(job.a), t = threadIdx.x, first = t / lanes * lanes, lane = t - first;
  unsigned mask = (kAllLanes >> (kWarp - lanes)) << first % kWarp;
  words[t] = job.in[t];
  for (unsigned round = 0; round < 1 + first / lanes % 3; ++round) {
    __syncwarp(mask);
    uint64_t next = words[first + (lane + 1) % lanes];
    __syncwarp(mask);
    words[t] = next;
  }
  job.out[t] = words[t];
}

// Bytes side by side, each another thread's; words that all read, blocks too.
__global__ void neighbours(Job job) {
  unsigned char* bytes = shared_storage<Second>().bytes;
  auto* out = reinterpret_cast<unsigned char*>(job.out) + blockIdx.x * blockDim.x;
  bytes[threadIdx.x] = static_cast<unsigned char>(job.in[0] + threadIdx.x);
  out[threadIdx.x] = bytes[threadIdx.x];
  __syncthreads();
  uint32_t all = 0;
  for (unsigned i = 0; i < blockDim.x; i += 4) all += *reinterpret_cast<uint32_t*>(bytes + i);
  if (all == 0xdeadbeef) out[threadIdx.x] = 0;
}

// ---- bugs ----

// A neighbour's word, before anyone has said that it is there.
__global__ void race(Job job) {
  uint64_t* words = shared_storage<Partial>().words;
  words[threadIdx.x] = job.in[threadIdx.x];
  job.out[threadIdx.x] = words[(threadIdx.x + 1) % blockDim.x];
}

// The words are read and at once written again for the next round: a write that may come before another's read.
__global__ void missing_barrier_before_a_write(Job job) {
  uint64_t* words = shared_storage<Partial>().words;
  uint64_t mine = job.in[threadIdx.x];
  for (int round = 0; round < 3; ++round) {
    words[threadIdx.x] = mine;
    __syncthreads();
    mine = words[(threadIdx.x + 1) % blockDim.x];
  }
  job.out[threadIdx.x] = mine;
}

// Lanes of a warp don't run in step; a shuffle doesn't order their memory.
__global__ void missing_syncwarp(Job job) {
  uint64_t* words = shared_storage<Partial>().words;
  words[threadIdx.x] = job.in[threadIdx.x];
  int lane = __shfl_xor_sync(kAllLanes, int(threadIdx.x), 1);
  job.out[threadIdx.x] = words[lane];
}

// Half a warp meets; the other half isn't there.
__global__ void syncwarp_of_half(Job job) {
  uint64_t* words = shared_storage<Partial>().words;
  words[threadIdx.x] = job.in[threadIdx.x];
  __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
  job.out[threadIdx.x] = words[threadIdx.x ^ 16];
}

__global__ void race_of_blocks(Job job) {
  if (threadIdx.x == 0) job.out[0] = job.in[0] + blockIdx.x;
}
__global__ void read_of_another_block(Job job) {
  job.out[blockIdx.x] = job.in[0];
  if (job.out[(blockIdx.x + 1) % gridDim.x] == 77) job.out[blockIdx.x] = 78;
}
__global__ void write_after_another_blocks_read(Job job) {
  job.out[1 + blockIdx.x] = job.out[0];
  if (blockIdx.x == job.a) job.out[0] = 1;
}
__global__ void plain_beside_atomic(Job job) {
  unsigned& word = shared_storage<unsigned>();
  if (threadIdx.x == 0) word = 0;
  __syncthreads();
  if (threadIdx.x % 2 == 0) atomicAdd(&word, 1u);
  else job.out[threadIdx.x] = word;
}

// b: a word of static (a = 0) or dynamic (a = 1) shared memory that isn't there.
__global__ void shared_out_of_bounds(Job job) {
  uint64_t* words = job.a != 0 ? dynamic_shared<uint64_t>() : shared_storage<First>().words;
  if (threadIdx.x == 1) words[job.b] = job.c;
}
__global__ void shared_read_out_of_bounds(Job job) {
  uint64_t* words = dynamic_shared<uint64_t>();
  words[threadIdx.x] = 1;
  if (threadIdx.x == 1) job.out[0] = words[job.b];
}
__global__ void global_out_of_bounds(Job job) {
  if (threadIdx.x == 1) job.out[job.b] = 1;
}
__global__ void global_read_out_of_bounds(Job job) {
  if (threadIdx.x == 1) job.out[0] = job.in[job.b];
}

__global__ void uninitialised(Job job) {
  float* words = dynamic_shared<float>();
  if (threadIdx.x != 3) words[threadIdx.x] = 1;
  __syncthreads();
  job.out[threadIdx.x] = word(words[threadIdx.x]);
}
// The second block finds nothing that the first has left.
__global__ void left_by_another_block(Job job) {
  uint64_t* words = shared_storage<First>().words;
  if (job.a != 0) words[threadIdx.x] = 1;
  job.out[thread_number()] = words[threadIdx.x];
}

__global__ void exit_before_barrier(Job) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void barrier_in_branches(Job) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  else __syncthreads();
}
__global__ void barriers_of_two_kinds(Job) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads_or(1);
}
__global__ void missing_lane(Job) {
  if (threadIdx.x != 7) __shfl_sync(kAllLanes, 1, 0);
}
__global__ void caller_not_in_mask(Job) { __syncwarp(0xfffffffe); }
__global__ void masks_that_differ(Job) { __ballot_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff8000u, 1); }
__global__ void shuffles_of_two_kinds(Job) {
  if (threadIdx.x < 16) __shfl_up_sync(kAllLanes, 1, 1);
  else __shfl_down_sync(kAllLanes, 1, 1);
}
__global__ void shuffle_in_branches(Job) {
  if (threadIdx.x < 16) __shfl_sync(kAllLanes, 1, 1);
  else __shfl_sync(kAllLanes, 1, 1);
}
__global__ void shuffle_against_barrier(Job) {
  if (threadIdx.x < 16) __shfl_sync(kAllLanes, 1, 1);
  else __syncthreads();
}
__global__ void lanes_that_are_not_there(Job) { __syncwarp(); }
__global__ void odd_width(Job) { __shfl_sync(kAllLanes, 1, 1, 12); }
__global__ void misaligned_atomic(Job job) {
  atomicAdd(reinterpret_cast<unsigned*>(reinterpret_cast<char*>(job.out) + 2), 1u);
}
__global__ void trap(Job) { __trap(); }
__global__ void wild_address(Job job) {
  if (threadIdx.x == 4) *reinterpret_cast<volatile uint64_t*>(job.a) = 1;
}
__global__ void deep_recursion(Job job) {
  struct Frame {
    static __device__ uint64_t descend(uint64_t depth, const volatile uint64_t* above) {
      volatile uint64_t here[64];
      here[depth % 64] = above[0] + depth;
      return depth == 0 ? above[0] : descend(depth - 1, here) + here[depth % 64];
    }
  };
  uint64_t top = job.in[0];
  job.out[threadIdx.x] = Frame::descend(uint64_t(job.a), &top);
}

constexpr int kBound = 96;
template <typename T> __global__ void __launch_bounds__(kBound, 2) bounded(Job job) {
  job.out[threadIdx.x] = sizeof(T);
}
template <int Bound> __global__ void __launch_bounds__(2 * Bound) bounded_by_argument(Job job) { job.out[0] = 1; }

struct Large { unsigned char bytes[40 << 10]; };
struct AlsoLarge { unsigned char bytes[10 << 10]; };
__global__ void static_memory(Job job) {
  if (job.a > 0) shared_storage<Large>().bytes[threadIdx.x] = 1;
#ifdef FASTSPARSE_EMULATED  // ptxas finds it too
  if (job.a > 1) shared_storage<AlsoLarge>().bytes[threadIdx.x] = 1;
#endif
}

struct Probe {
  const char* name;
  void (*kernel)(Job);
};
#define PROBE(name) {#name, name}
[[maybe_unused]] const Probe probes[] = {
    PROBE(indices), PROBE(shuffles<int>), PROBE(shuffles<unsigned>), PROBE(shuffles<long>),
    PROBE(shuffles<unsigned long long>), PROBE(shuffles<float>), PROBE(shuffles<double>), PROBE(votes), PROBE(tensor_core),
    PROBE(barriers),
    PROBE(atomics<int>), PROBE(atomics<unsigned>), PROBE(atomics<unsigned long long>), PROBE(float_atomics<float>),
    PROBE(float_atomics<double>), PROBE(other_atomics), PROBE(shared_memory), PROBE(bits), PROBE(rounding),
    PROBE(conversions), PROBE(extremes), PROBE(packets), PROBE(order), PROBE(tree_sum), PROBE(groups_of_lanes),
    PROBE(neighbours), PROBE(race), PROBE(missing_barrier_before_a_write),
    PROBE(missing_syncwarp), PROBE(syncwarp_of_half), PROBE(race_of_blocks), PROBE(read_of_another_block),
    PROBE(write_after_another_blocks_read), PROBE(plain_beside_atomic), PROBE(shared_out_of_bounds),
    PROBE(shared_read_out_of_bounds), PROBE(global_out_of_bounds), PROBE(global_read_out_of_bounds),
    PROBE(uninitialised), PROBE(left_by_another_block), PROBE(exit_before_barrier), PROBE(barrier_in_branches),
    PROBE(barriers_of_two_kinds),
    PROBE(missing_lane), PROBE(caller_not_in_mask), PROBE(masks_that_differ), PROBE(shuffles_of_two_kinds),
    PROBE(shuffle_in_branches), PROBE(shuffle_against_barrier), PROBE(lanes_that_are_not_there), PROBE(odd_width),
    PROBE(misaligned_atomic), PROBE(trap), PROBE(wild_address), PROBE(deep_recursion), PROBE(bounded<float>),
    PROBE(bounded_by_argument<64>), PROBE(static_memory),
};

}  // namespace

#ifdef FASTSPARSE_EMULATED
// Runs a probe; null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* run_probe(const char* name, const unsigned* grid,
                                                                       const unsigned* block, uint64_t shared_bytes,
                                                                       const uint64_t* in, uint64_t* out, int64_t a,
                                                                       int64_t b, int64_t c) {
  static thread_local std::string message;
  for (const Probe& probe : probes) {
    if (std::strcmp(probe.name, name) != 0) continue;
    try {
      if (shared_bytes > 48 << 10)
        cudaFuncSetAttribute(reinterpret_cast<const void*>(probe.kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             99 << 10);
      emulator::launch(name, probe.kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes,
                       Job{in, out, a, b, c});
      return nullptr;
    } catch (const std::exception& error) {
      message = error.what();
      return message.c_str();
    }
  }
  return (message = std::string("no such probe: ") + name).c_str();
}
#endif

}  // namespace fastsparse::cuda
