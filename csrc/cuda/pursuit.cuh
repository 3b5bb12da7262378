// One step of matching pursuit a row, and what comes before the first: device code of matching_pursuit and
// matching_pursuit_step.
//
// The vendor's library multiplies residuals with the atoms, scaled to norm 1. Its scores only choose. Each is within a
// bound of the exact one, so only atoms that come within twice the bound of the best can be the best: almost always one
// alone. Where there are several they are scored again, from the residual and the atoms themselves; where there are too
// many, or numbers aren't finite, all atoms of the row are. So the choice is that of exact scores to the last bit, ties
// going to the lowest atom, whichever way the first ones came about: a batch's other rows, its cutting into blocks and
// the method have no part in it. The coefficient and the residual are computed from the atom itself.
//
// Bytes, a row: M scores read from L2, D elements of one atom (of each candidate); the product does the rest.
//
// The bound. u is the unit roundoff, gamma = n u / (1 - n u) for n = D + 8 bounds a sum of D products in any order, and
// a little more (Higham 2002, "Accuracy and stability of numerical algorithms", section 3.1). For atoms w, of direction
// w^ = w / |w|, stored as v = w^ + dv, |dv| <= e; with W = 1, e = 2 u (in fp64 the norm's own rounding, gamma, comes
// on top). Where all atoms are promised to be of norm 1, w^ = v = w, e = 0, and W >= 1 is the largest norm there is.
//   A fresh score s = fl(v.r):      |s - w^.r| <= W |r| (gamma + e)                                             = B
//   An exact one, fl(w.r) / |w|, is off by         W |r| h, h = (D / 32 + 16) u
//   After a step, see matching_pursuit.cuh:      B' of B
// plus what gets lost where numbers are subnormal. Where the product runs on tensor cores (`Split`), gamma is
//   3.1 2^-16 for the products of low parts that are left out, and of what both parts leave,
//   1.02 (3 a D + 8) 2^-24 for sums of 3 D products, where those of D are off by a D 2^-24 (tensor_cores.cu).
// Two scores' order is certain where they lie 2 (B + W |r| h) apart.
#pragma once

#include <cfloat>

#include "cuda/gather.cuh"
#include "cuda/select.cuh"

namespace fastsparse::cuda {

inline constexpr int kPursuitThreads = 512;  // of a block, at most
inline constexpr int kMostCandidates = 256;  // of which exact scores are computed one by one
inline constexpr int kAtomThreads = 256;

// What fp64 squares of fp32 numbers can't underflow below, but those of fp64 can: lengths are sums of squares.
template <typename C> inline constexpr double kLeastLength = sizeof(C) == 8 ? 1e-140 : 0;
template <typename C> inline constexpr C kLargest = C(sizeof(C) == 8 ? DBL_MAX : FLT_MAX);

// The atoms as they are given, and what belongs to each.
template <typename T> struct Atoms {
  const T* rows;
  int64_t stride;
  int M, D;
  bool packets;           // all rows are whole packets on 16 bytes
  const double* squares;  // |w|^2; null: all are promised to be 1
  const double* longest;  // W above
};

// fp32 operands of a product as three parts in bf16, x = high + low + at most 2^-16 |x|, so that one product of depth
// 3 D on tensor cores has high.high + low.high + high.low: a product of three times the operations at 16 times the
// speed. Rows of `depth` each: high, low, high to the left, high, high, low to the right.
struct Split {
  bf16* rows;
  int64_t depth;  // of one part, a multiple of 8

  __device__ __forceinline__ void write(int64_t row, int64_t d, float value, bool left) const {
    bf16 high = narrow<bf16>(value), low = narrow<bf16>(value - widen(high));
    bf16* to = rows + row * 3 * depth + d;
    to[0] = high;
    to[depth] = left ? low : high;
    to[2 * depth] = left ? high : low;
  }
};

// How far results may be off, in units of the numbers' magnitude; `lost` absolutely.
struct Rounding {
  double unit, product, direction, dot, lost;
};

// A block of rows in the making.
template <typename C> struct Work {
  C* residuals;  // (rows, depth)
  C* scores;     // (rows, latents)
  int depth, latents;
  int32_t* steps;  // (rows) how many were taken
};

// Where a block's results go, and when a row ends.
template <typename T> struct Goal {
  T* values;  // (rows, k)
  int64_t* indices;
  int64_t k;
  double tol;
  bool nonnegative;
  Rounding rounding;

  __device__ __forceinline__ void write(int64_t row, int64_t t, Accumulator<T> value, int64_t index) const {
    values[row * k + t] = narrow<T>(value);
    indices[row * k + t] = index;
  }
};

// ---- what comes before the first step ----

// Where atoms' directions go, those that there is room for.
template <typename C> struct Directions {
  C* whole;           // (latents, depth)
  Split left, right;  // of fp32
  int64_t latents, depth;
};

// The atoms' directions, w / |w| or w itself, zeros around them, and their largest norm; `longest` begins at 0. A warp
// an atom.
template <typename T>
__global__ void __launch_bounds__(kAtomThreads)
    matching_pursuit_prepare(const T* rows, int64_t stride, int64_t M, int64_t D, bool normalized, const double* squares,
                             double* longest, Directions<Accumulator<T>> directions) {
  using C = Accumulator<T>;
  int64_t m = int64_t(blockIdx.x) * (kAtomThreads / kWarp) + warp_index();
  if (m >= directions.latents) return;
  double norm = m < M ? sqrt(squares[m]) : 0, factor = normalized ? 1 : norm == 0 ? 0 : 1 / norm;
  if (lane_index() == 0) {
    // The bits of numbers that aren't negative have their order. NaN and infinities are found by what they do to scores.
    double length = normalized && norm > 1 && norm <= DBL_MAX ? norm : 1;
    atomicMax(reinterpret_cast<unsigned long long*>(longest), (unsigned long long)(__double_as_longlong(length)));
  }
  auto direction = [&](int64_t d) { return m < M && d < D ? C(widen(rows[m * stride + d]) * factor) : C(0); };
  if (directions.whole) {
#pragma unroll 4
    for (int64_t d = lane_index(); d < directions.depth; d += kWarp)
      directions.whole[m * directions.depth + d] = direction(d);
  }
  if constexpr (sizeof(C) == 4) {
    if (!directions.right.rows) return;
#pragma unroll 4
    for (int64_t d = lane_index(); d < directions.right.depth; d += kWarp) {
      directions.right.write(m, d, direction(d), false);
      if (directions.left.rows) directions.left.write(m, d, direction(d), true);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(kAtomThreads)
    matching_pursuit_split(const C* residuals, int64_t depth, int64_t rows, int64_t D, Split left) {
  int64_t i = int64_t(blockIdx.x) * kAtomThreads + threadIdx.x, row = quotient(i, left.depth), d = i - row * left.depth;
  if (row < rows) left.write(row, d, d < D ? residuals[row * depth + d] : 0.0f, true);
}

template <typename T>
__global__ void __launch_bounds__(kAtomThreads)
    matching_pursuit_load(const T* x, int64_t x_row, int64_t x_column, int64_t rows, int64_t D,
                          Accumulator<T>* residuals, int64_t depth) {
  int64_t i = int64_t(blockIdx.x) * kAtomThreads + threadIdx.x, row = quotient(i, depth), d = i - row * depth;
  if (row < rows) residuals[i] = d < D ? widen(x[row * x_row + d * x_column]) : Accumulator<T>(0);
}

template <typename T>
__global__ void __launch_bounds__(kAtomThreads)
    matching_pursuit_store(const Accumulator<T>* residuals, int64_t depth, int64_t rows, int64_t D, T* out) {
  int64_t i = int64_t(blockIdx.x) * kAtomThreads + threadIdx.x, row = quotient(i, D);
  if (row < rows) out[i] = narrow<T>(residuals[row * depth + (i - row * D)]);
}

// ---- one row, by a block ----

// Combines a value of every thread of the block, in a fixed order; to be called by all of them.
template <typename V, typename Combine> __device__ __forceinline__ V over_block(V value, Combine combine) {
  struct Parts {
    V part[kPursuitThreads / kWarp];
  };
  auto& shared = shared_storage<Parts>();
  value = across_warp(value, combine);
  __syncthreads();  // the parts of the last call have been read
  if (lane_index() == 0) shared.part[warp_index()] = value;
  __syncthreads();
  V result = shared.part[0];
#pragma unroll 1
  for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) result = combine(result, shared.part[warp]);
  return result;
}

struct Candidates {
  int32_t latent[kMostCandidates];
  int count;
};

// A residual and its scores, in shared or in global memory. What isn't an array is the same in every thread.
template <typename T> struct PursuedRow {
  using C = Accumulator<T>;
  static constexpr int size = Packet<C>::size, width = Packet<T>::size;

  const Atoms<T>& atoms;
  const Goal<T>& goal;
  C* residual;
  C* scores;
  int latents;
  double longest, length, error;  // W, |r|, B

  __device__ __forceinline__ PursuedRow(const Atoms<T>& atoms, const Goal<T>& goal, C* residual, C* scores,
                                        int latents)
      : atoms(atoms), goal(goal), residual(residual), scores(scores), latents(latents), longest(*atoms.longest) {}

  __device__ __forceinline__ C key(C score) const { return goal.nonnegative ? score : C(fabs(score)); }

  // Calls visit(w, at) with some columns of an atom, widened, and where they begin, for a share of the threads.
  template <typename Visit>
  __device__ __forceinline__ void each_column(int64_t m, int rank, int ranks, const Visit& visit) const {
    const T* row = atoms.rows + m * atoms.stride;
    if (atoms.packets) {
#pragma unroll 2
      for (int d = rank * width; d < atoms.D; d += ranks * width) {
        C w[width];
        widen_columns<T, width>(load_packet(row + d), w);
        visit(w, d);
      }
    } else {
#pragma unroll 2
      for (int d = rank; d < atoms.D; d += ranks) {
        C w[1] = {widen(row[d])};
        visit(w, d);
      }
    }
  }

  // The power of two that brings an atom's norm near 1, as far as C reaches: products of tiny atoms, whose scores count
  // as much as any, must not vanish, nor those of huge ones overflow.
  __device__ __forceinline__ double factor(int64_t m) const {
    if (!atoms.squares) return 1;
    constexpr int most = sizeof(C) == 8 ? 500 : 120;
    int exponent = (int(__double_as_longlong(atoms.squares[m]) >> 52) - 1023) / 2;
    return __longlong_as_double((long long)(1023 - Most()(-most, Least()(exponent, most))) << 52);
  }

  // A share of w.r times the factor: sums of D / 32 products at most, four or fewer of which are added here, and 32 at
  // most later.
  __device__ __forceinline__ C part_of_dot(int64_t m, double factor, int rank, int ranks) const {
    const C by = C(factor);
    C sums[4] = {};
    each_column(m, rank, ranks, [&](const auto& w, int d) {
#pragma unroll
      for (int c = 0; c < int(sizeof(w) / sizeof(C)); ++c) sums[c % 4] += w[c] * by * residual[d + c];
    });
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // The score that decides. By a warp.
  __device__ __forceinline__ C exact(int64_t m) const {
    double factor = this->factor(m);
    C product = across_warp(part_of_dot(m, factor, lane_index(), kWarp), Sum());
    if (!atoms.squares) return product;
    double square = atoms.squares[m];
    return square == 0 ? C(0) : C(double(product) / (sqrt(square) * factor));
  }

  // |r|, which decides about the end, and bounds what scores are off.
  __device__ __forceinline__ void measure() {
    double sum = 0;
    for (int d = int(threadIdx.x); d < atoms.D; d += int(blockDim.x)) sum += double(residual[d]) * double(residual[d]);
    length = sqrt(over_block(sum, Sum()));
  }

  // Of scores that are a fresh product.
  __device__ __forceinline__ void trust_product() {
    error = longest * length * (goal.rounding.product + goal.rounding.direction) + goal.rounding.lost;
  }

  // The largest key; an infinity where a score isn't finite.
  __device__ __forceinline__ C best_key() const {
    C best = -C(INFINITY);
#pragma unroll 2
    for (int v = int(threadIdx.x) * size; v < latents; v += int(blockDim.x) * size)
      update_best(best, load_packet(scores + v));
    return over_block(best, Most());
  }
  __device__ __forceinline__ void update_best(C& best, const Packet<C>& packet) const {
#pragma unroll
    for (int e = 0; e < size; ++e)
      best = Most()(best, fabs(packet.value[e]) <= kLargest<C> ? key(packet.value[e]) : C(INFINITY));
  }

  // The best atom, given the largest key; -1 where there is none to take.
  __device__ int32_t choose(C best) {
    if (length != length) return first_atom();  // all scores are NaN
    if (best <= kLargest<C> && length <= DBL_MAX && length >= kLeastLength<C>) {
      if (length == 0) return -1;
      auto& candidates = shared_storage<Candidates>();
      int count = collect(candidates, best);
      if (count == 0) return -1;  // it is the padding that has the best key, 0: all others are negative
      if (count == 1) return candidates.latent[0];
      if (count <= kMostCandidates) return best_exact(&candidates, count);
    }
    __syncthreads();  // all have read the scores
    int32_t latent = best_exact(nullptr, atoms.M);
    error = longest * length * goal.rounding.dot + goal.rounding.lost;
    return latent;
  }

  // The atoms that may be the best, in whatever order; how many there are, or more than there is room for.
  __device__ __forceinline__ int collect(Candidates& candidates, C best) const {
    const Rounding& rounding = goal.rounding;
    double apart = 2.001 * (error + longest * length * rounding.dot + rounding.lost) + 8 * rounding.unit * fabs(best);
    C bound = C(double(best) - apart);
    if (threadIdx.x == 0) candidates.count = 0;
    __syncthreads();
    bool room = true;
#pragma unroll 2
    for (int v = int(threadIdx.x) * size; v < latents && room; v += int(blockDim.x) * size) {
      Packet<C> packet = load_packet(scores + v);
#pragma unroll
      for (int e = 0; e < size; ++e) {
        if (key(packet.value[e]) < bound || v + e >= atoms.M) continue;
        int at = atomicAdd(&candidates.count, 1);
        room = at < kMostCandidates;
        if (room) candidates.latent[at] = v + e;
      }
    }
    __syncthreads();
    return candidates.count;
  }

  // The atom with the largest exact key, the lowest of those that have it, among some candidates, or among all atoms,
  // whose scores are replaced. A warp an atom.
  __device__ int32_t best_exact(const Candidates* some, int count) const {
    Order<C> best = 0;
    int32_t lowest = INT32_MAX;
#pragma unroll 1
    for (int i = warp_index(); i < count; i += int(blockDim.x) / kWarp) {
      int32_t m = some ? some->latent[i] : i;
      C score = exact(m);
      if (!some && lane_index() == 0) scores[m] = score;
      Order<C> order = order_of(key(score));
      if (order > best || (order == best && m < lowest)) lowest = m;
      best = Most()(best, order);
    }
    Order<C> most = over_block(best, Most());
    return over_block(best == most ? lowest : INT32_MAX, Least());
  }

  // The first atom that isn't zero, if any.
  __device__ __forceinline__ int32_t first_atom() const {
    if (!atoms.squares) return 0;
    for (int base = 0; base < atoms.M; base += int(blockDim.x)) {
      int m = base + int(threadIdx.x);
      bool there = m < atoms.M && !(atoms.squares[m] == 0);
      int32_t first = over_block(there ? m : INT32_MAX, Least());
      if (first < INT32_MAX) return first;
    }
    return -1;
  }

  // Takes an atom from the residual; returns its coefficient, 0 where that is no step.
  __device__ C take(int64_t m) {
    int thread = int(threadIdx.x), threads = int(blockDim.x);
    double factor = this->factor(m);
    C value = over_block(part_of_dot(m, factor, thread, threads), Sum());
    if (atoms.squares) {
      double square = atoms.squares[m];
      if (square == 0) return 0;
      value = C(double(value) / (square * factor));
    }
    if (value == 0 || (goal.nonnegative && value <= 0)) return 0;
    double sum = 0;
    each_column(m, thread, threads, [&](const auto& w, int d) {
#pragma unroll
      for (int c = 0; c < int(sizeof(w) / sizeof(C)); ++c) {
        C left = residual[d + c] - value * w[c];
        residual[d + c] = left;
        sum += double(left) * double(left);
      }
    });
    length = sqrt(over_block(sum, Sum()));  // a barrier too: the residual is what it is now for all threads
    return value;
  }

  // One step, given the largest key; returns the coefficient and, in `latent`, the atom; 0 where the row ends.
  __device__ __forceinline__ C step(C best, int32_t& latent) {
    if (goal.tol > 0 && length <= goal.tol) return 0;
    latent = choose(best);
    return latent < 0 ? C(0) : take(latent);
  }
};

// Step t of a row whose scores are fresh. A block a row.
template <typename T>
__global__ void __launch_bounds__(kPursuitThreads, 2)
    matching_pursuit_take(Atoms<T> atoms, Goal<T> goal, Work<Accumulator<T>> work, int64_t t) {
  using C = Accumulator<T>;
  int64_t n = blockIdx.x;
  int32_t latent = 0;
  C value = 0;
  if (t == 0 || work.steps[n] == t) {
    PursuedRow<T> row(atoms, goal, work.residuals + n * work.depth, work.scores + n * work.latents, work.latents);
    row.measure();
    row.trust_product();
    value = row.step(row.best_key(), latent);
  }
  if (threadIdx.x != 0) return;
  goal.write(n, t, value, value == 0 ? 0 : latent);
  if (t == 0 || value != 0) work.steps[n] = value == 0 ? 0 : int32_t(t + 1);
}

}  // namespace fastsparse::cuda
