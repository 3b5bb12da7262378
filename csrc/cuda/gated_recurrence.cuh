// Gated recurrences h_t = f(h_{t-1}, u_t), whose channels don't mix, by three solvers: device code.
// fastsparse/reference/_solvers.py says what the solvers do, csrc/cells.h what a step is.
//
// Bytes an element-step, at least: 16 in fp32 (three inputs, one state; 20 for pairs of states), 8 in halves (10). From
// state to state it is 160 to 175 cycles, 90 to 100 ns at 1.755 GHz. That is a model of the machine code for sm_90, of
// what waits for what, with 20 cycles for an exponential or a reciprocal; nothing measured. So a machine with less than
// some 25000 threads waits for that, not for memory. The parallel solvers cut time into chunks, a thread each, and read
// the inputs again in every pass.
#pragma once

#include "cells.h"
#include "cuda/activations.cuh"
#include "cuda/affine.cuh"
#include "cuda/sequences.cuh"
#include "solvers.h"

namespace fastsparse::cuda {

// What a kernel is given. States are in the order in which a cell has them, of an LSTM c and h.
template <typename T, int States> struct Recurrence {
  const T* u;  // (B, T, 3, H), of any strides
  int64_t row_stride, step_stride, gate_stride, channel_stride;
  const T *weight, *peephole;  // (3, H) and (2, H), if the cell has that
  const T* start[States];      // (S, H), or null for zeros
  const int64_t* bounds;       // (S + 1,), or null for one sequence a row
  int64_t steps, H;            // steps: of a row
  T* states[States];           // (B, T, H)
  Accumulator<T>* guesses[States];  // (B, T, H), the same memory where the types are; Newton's method alone has them
  int32_t* passes;             // (S, H)
};

// One channel of one sequence, a line.
template <typename T, template <typename> typename Form> struct GatedLine {
  using C = Accumulator<T>;
  using Cell = Form<Math<C>>;
  static constexpr int n = Cell::kStates;
  struct Input { T gate[3]; };

  Cell cell;
  const T* u;  // of the first step
  int64_t step_stride, gate_stride;
  int64_t place, H, length;  // place: of the first state, in states
  C start[n];

  __device__ __forceinline__ GatedLine(const Recurrence<T, n>& problem, int64_t s, int64_t channel)
      : step_stride(problem.step_stride), gate_stride(problem.gate_stride), H(problem.H) {
    Span steps = span_of(problem.bounds, s, problem.steps);
    int64_t row = problem.bounds ? 0 : s, first = steps.first - row * problem.steps;
    length = steps.count;
    u = problem.u + row * problem.row_stride + first * step_stride + channel * problem.channel_stride;
    place = steps.first * H + channel;
#pragma unroll
    for (int i = 0; i < Cell::kWeights; ++i)
      cell.w[i] = widen(i < 3 ? problem.weight[i * H + channel] : problem.peephole[(i - 3) * H + channel]);
#pragma unroll
    for (int i = 0; i < n; ++i) start[i] = problem.start[i] ? widen(problem.start[i][s * H + channel]) : C(0);
  }

  __device__ __forceinline__ Input read(const T* at) const {
    const T *second = at + gate_stride, *third = second + gate_stride;
    return {*at, *second, *third};
  }
  __device__ __forceinline__ Input input(int64_t t) const { return read(u + t * step_stride); }

  __device__ __forceinline__ static void widened(const Input& input, C (&u)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) u[i] = widen(input.gate[i]);
  }

  // The state after a step from zeros: a guess at it.
  __device__ __forceinline__ void guess(const Input& input, C (&state)[n]) const {
    C u[3];
    widened(input, u);
#pragma unroll
    for (int i = 0; i < n; ++i) state[i] = 0;
    cell.step(u, state);
  }

  // The most that rounding errors of variance 1 may spread to: errors are beside 1, or beside what is remembered of a
  // first state that is more.
  __device__ __forceinline__ static C most_spread(C first) {
    C unit = fabs(first) <= 1 ? C(1) : fabs(first);  // NaN, which nothing is less than, comes through
    return kMostSpread / (unit * unit);
  }

  // Where the state after a step is, in states.
  __device__ __forceinline__ int64_t at(int64_t t) const { return place + t * H; }

  template <typename To>
  __device__ __forceinline__ static void store(To* const (&states)[n], int64_t at, const C (&state)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) states[i][at] = narrow<To>(state[i]);
  }

  // Calls f(u, at(t)) for the steps t from `first` to before `last`. While it takes Batch of them, the inputs of the
  // next Batch are on their way. A warp has six counters to wait by, and its loads share one or two: steps that each
  // asked for inputs of a later one would wait for what was asked for last. A batch waits once, for all it needs.
  template <int Batch, typename F> __device__ __forceinline__ void walk(int64_t first, int64_t last, F&& f) const {
    const T* from = u + first * step_stride;  // addresses go from step to step: a sum each, and few registers
    int64_t where = at(first);
    Input now[Batch], next[Batch] = {};
    // Its branch is also what keeps the compiler from moving loads in among steps.
    auto each = [](int64_t all, auto&& g) {
      int count = int(min(all, int64_t{Batch}));
      if (count == Batch) {
#pragma unroll
        for (int i = 0; i < Batch; ++i) g(i);
      } else {
#pragma unroll
        for (int i = 0; i < Batch; ++i)
          if (i < count) g(i);
      }
    };
    auto fetch = [&](int i) {
      next[i] = read(from);
      from += step_stride;
    };
    auto take = [&](int i) {
      C u[3];
      widened(now[i], u);
      f(u, where);
      where += H;
    };
    each(last - first, fetch);
    for (int64_t left = last - first; left > 0; left -= Batch) {
#pragma unroll
      for (int i = 0; i < Batch; ++i) now[i] = next[i];
      each(left - Batch, fetch);
      each(left, take);
    }
  }
};

// ---- sequential ----

inline constexpr int kSequentialThreads = 128;

// A thread a line, whatever sequences a block's lines are of. With `redo` only those that a parallel solver has given
// up. Inputs are asked for 16 steps early, 1500 ns: from memory they take some 700, and longer where it is busy.
template <typename T, template <typename> typename Form>
__global__ void __launch_bounds__(kSequentialThreads)
    gated_sequential(Recurrence<T, GatedLine<T, Form>::n> problem, int64_t lines, bool redo) {
  using C = Accumulator<T>;
  constexpr int n = GatedLine<T, Form>::n;
  int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= lines) return;
  int32_t& passes = problem.passes[number];
  if (redo && passes != kGivenUp) return;
  if (!redo) passes = kNoPasses;
  int64_t s = number / problem.H, channel = number - s * problem.H;
  GatedLine<T, Form> line(problem, s, channel);
  C state[n];
#pragma unroll
  for (int i = 0; i < n; ++i) state[i] = line.start[i];
  line.template walk<sizeof(C) == 8 ? 8 : 16>(0, line.length, [&](const C (&u)[3], int64_t at) {
    line.cell.step(u, state);
    line.store(problem.states, at, state);
  });
}

// ---- what the parallel solvers share ----

// A block has 2^group_bits channels of a sequence, neighbours in memory and in a warp, and of each as many chunks of
// time as it has threads for.
template <typename C, int n> inline constexpr int kShootingThreads = sizeof(C) == 8 || n == 2 ? 256 : 512;
inline constexpr int kNewtonThreads = 256;
inline constexpr int kMostChannels = 16;

// Else lanes that are whole chunks apart meet in a bank.
__host__ __device__ constexpr int padded(int index) { return index + index / 32; }

// What some steps make of the states that they start from, A x + b, and of the covariance v of their rounding errors,
// A v A^T + errors.
template <typename C, int n> struct Piece {
  Affine<C, n> map;
  C errors[kCovariance<n>];

  __device__ __forceinline__ static Piece nothing() { return {Affine<C, n>::identity(), {}}; }

  __device__ __forceinline__ void carry(const C (&v)[kCovariance<n>], C (&out)[kCovariance<n>]) const {
#pragma unroll
    for (int i = 0; i < kCovariance<n>; ++i) out[i] = v[i];
    carry_errors<n>(map.A, out);
#pragma unroll
    for (int i = 0; i < kCovariance<n>; ++i) out[i] += errors[i];
  }

  __device__ __forceinline__ Piece after(const Piece& earlier) const {
    Piece both{map.after(earlier.map), {}};
    carry(earlier.errors, both.errors);
    return both;
  }
};

template <typename C, int n> __device__ __forceinline__ Piece<C, n> from_below(const Piece<C, n>& piece, int lanes) {
  Piece<C, n> other{from_below(piece.map, lanes), {}};
#pragma unroll
  for (int i = 0; i < kCovariance<n>; ++i) {
    other.errors[i] = __shfl_up_sync(kAllLanes, piece.errors[i], unsigned(lanes));
  }
  return other;
}

// Shared memory: a piece and a vector of every thread, three vectors, a covariance and a flag of every channel.
template <typename C, int n> constexpr int64_t parallel_shared_bytes(int threads) {
  return int64_t{padded(threads)} * (n * n + 2 * n + kCovariance<n>) * int64_t(sizeof(C)) +
         int64_t{3 * n + kCovariance<n>} * kMostChannels * int64_t(sizeof(C)) + kMostChannels * int64_t(sizeof(int));
}

// What is said of a channel in a pass.
inline constexpr int kOff = 1, kHopeless = 2;  // not certified; NaN, which no pass mends
inline constexpr int kRough = 4;               // certified, and not negligible

template <typename C, int n> struct Team {
  static constexpr int kErrors = kCovariance<n>, kAll = n * n + n + kErrors;

  int channels, chunks, mine, channel, chunk;  // mine: this thread's place
  C *pieces, *vectors, *totals, *ends;
  int* said;

  __device__ __forceinline__ explicit Team(int group_bits)
      : channels(1 << group_bits), chunks(int(blockDim.x) >> group_bits), mine(padded(int(threadIdx.x))),
        channel(int(threadIdx.x) & (channels - 1)), chunk(int(threadIdx.x) >> group_bits),
        pieces(dynamic_shared<C>()), vectors(pieces + padded(int(blockDim.x)) * kAll),
        totals(vectors + padded(int(blockDim.x)) * n), ends(totals + (n + kErrors) * kMostChannels),
        said(reinterpret_cast<int*>(ends + 2 * n * kMostChannels)) {}

  // The parts of a piece, or vector, lie as far apart as there are threads.
  __device__ __forceinline__ int part(int i) const { return i * padded(int(blockDim.x)); }
  __device__ __forceinline__ C* covariances() const { return pieces + part(n); }
  __device__ __forceinline__ C* factors() const { return pieces + part(n + kErrors); }

  __device__ __forceinline__ Piece<C, n> piece(int place) const {
    Piece<C, n> piece;
    vector(pieces, place, piece.map.b);
    vector(covariances(), place, piece.errors);
    vector(factors(), place, piece.map.A);
    return piece;
  }

  template <int m>
  __device__ __forceinline__ void put_vector(C* vectors, int place, const C (&vector)[m]) const {
#pragma unroll
    for (int i = 0; i < m; ++i) vectors[part(i) + place] = vector[i];
  }

  template <int m> __device__ __forceinline__ void vector(const C* vectors, int place, C (&vector)[m]) const {
#pragma unroll
    for (int i = 0; i < m; ++i) vector[i] = vectors[part(i) + place];
  }

  // From every chunk's piece, x_{j+1} = A_j x_j + b_j and v_{j+1} = A_j v_j A_j^T + errors_j with x_0 = 0 and v_0 = 0,
  // gives the thread its x_j and v_j; `totals` gets those after the last chunk. All threads call; two barriers. A warp
  // takes a channel, a lane some neighbouring chunks.
  __device__ __forceinline__ void across(const Piece<C, n>& own, C (&x)[n], C (&v)[kErrors]) const {
    put_vector(pieces, mine, own.map.b);
    put_vector(covariances(), mine, own.errors);
    put_vector(factors(), mine, own.map.A);
    __syncthreads();
    int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp, each = (chunks + kWarp - 1) / kWarp;
    int first = min(lane * each, chunks), last = min(first + each, chunks);
    for (int c = int(threadIdx.x) / kWarp; c < channels; c += warps) {
      auto all = Piece<C, n>::nothing();
      for (int j = first; j < last; ++j) all = piece(padded(j * channels + c)).after(all);
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        Piece<C, n> earlier = from_below(all, offset);
        if (lane >= offset) all = all.after(earlier);
      }
      C now[n], next[n], errors[kErrors], more[kErrors];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (lane == kWarp - 1) totals[i * kMostChannels + c] = all.map.b[i];
        now[i] = __shfl_up_sync(kAllLanes, all.map.b[i], 1);
        if (lane == 0) now[i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kErrors; ++i) {
        if (lane == kWarp - 1) totals[(n + i) * kMostChannels + c] = all.errors[i];
        errors[i] = __shfl_up_sync(kAllLanes, all.errors[i], 1);
        if (lane == 0) errors[i] = 0;
      }
      for (int j = first; j < last; ++j) {
        int place = padded(j * channels + c);
        Piece<C, n> chunk = piece(place);
        chunk.map.apply(now, next);
        chunk.carry(errors, more);
        put_vector(pieces, place, now);
        put_vector(covariances(), place, errors);
#pragma unroll
        for (int i = 0; i < n; ++i) now[i] = next[i];
#pragma unroll
        for (int i = 0; i < kErrors; ++i) errors[i] = more[i];
      }
    }
    __syncthreads();
    vector(pieces, mine, x);
    vector(covariances(), mine, v);
  }
};

// ---- shooting ----

inline constexpr int kLeastChunk = 16;  // steps; shorter ones cost more to join than they save

template <typename T, template <typename> typename Form>
__global__ void __launch_bounds__((kShootingThreads<Accumulator<T>, GatedLine<T, Form>::n>), 1)
    gated_shooting(Recurrence<T, GatedLine<T, Form>::n> problem, int group_bits) {
  using C = Accumulator<T>;
  constexpr int n = GatedLine<T, Form>::n;
  Team<C, n> team(group_bits);
  unsigned groups = unsigned((problem.H + team.channels - 1) >> group_bits);
  int64_t s = blockIdx.x / groups, channel = int64_t{blockIdx.x % groups} * team.channels + team.channel;
  bool inside = channel < problem.H;  // threads beyond the last channel have barriers to keep
  GatedLine<T, Form> line(problem, s, inside ? channel : problem.H - 1);

  int64_t each = max((line.length + team.chunks - 1) / team.chunks, int64_t{kLeastChunk});
  int64_t first = min(team.chunk * each, line.length), last = min(first + each, line.length);
  bool active = inside && first < last, single = each >= line.length;
  C start[n];
#pragma unroll
  for (int i = 0; i < n; ++i) start[i] = line.start[i];
  if (active && team.chunk > 0) line.guess(line.input(first - 1), start);

  int result = line.length > 0 ? kGivenUp : kNoPasses;
  bool open = active, once_more = false;
  for (int pass = 1; pass <= kShootingPasses; ++pass) {
    // Ends, tangents and errors; how large any tangent squared, the sum of its entries' squares, and any variance was.
    // States are kept from the second pass on: none of the first is right, but where there is one chunk alone.
    bool kept = pass > 1 || single;
    C state[n], largest = n, widest = 0;
    auto piece = Piece<C, n>::nothing();
    Affine<C, n>& tangent = piece.map;
#pragma unroll
    for (int i = 0; i < n; ++i) state[i] = start[i];
    if (open)
      line.template walk<sizeof(C) == 8 ? 4 : 8>(first, last, [&](const C (&u)[3], int64_t at) {
        C J[n * n], product[n * n];
        line.cell.step(u, state, J);
        Affine<C, n>::multiply(J, tangent.A, product);
        carry_errors<n>(J, piece.errors), add_errors<n>(piece.errors);
        C size = 0, variance = trace<n>(piece.errors);
#pragma unroll
        for (int i = 0; i < n * n; ++i) {
          tangent.A[i] = product[i];
          size += product[i] * product[i];
        }
        largest = size <= largest ? largest : size;  // NaN, which then stays, comes through
        widest = variance <= widest ? widest : variance;
        if (kept) line.store(problem.states, at, state);
      });

    // What starts are off by, D_{j+1} = P_j D_j + what chunk j's end is from the start of the next.
    team.put_vector(team.vectors, team.mine, start);
    if (team.chunk == 0) team.said[team.channel] = 0;
    __syncthreads();
    if (open && last < line.length) {
      C next[n];
      team.vector(team.vectors, padded(int(threadIdx.x) + team.channels), next);
#pragma unroll
      for (int i = 0; i < n; ++i) tangent.b[i] = state[i] - next[i];
    }
    C D[n], errors[kCovariance<n>];
    team.across(piece, D, errors);
    // Every state of the chunk, and its start, are off by at most |tangent| |D|: stricter than the reference where states
    // exceed 1, which those of gates only do while they remember a start that did. (That is read again: a register that
    // held it all the while would be one too many.)
    if (open) {
      C remembered = problem.start[0] ? widen(problem.start[0][s * problem.H + channel]) : C(0);
      C size = 0;
#pragma unroll
      for (int i = 0; i < n; ++i) size += fabs(D[i]);
      C bound = sqrt(largest) * size, variance = largest * trace<n>(errors) + widest;
      int off = kept ? 0 : kOff;
      if (!(bound < kSmall<C> && variance <= line.most_spread(remembered))) off |= size == size ? kOff : kHopeless;
      else if (!(bound < kNegligible<C>) && !once_more) off |= kRough;
      if (off) atomicOr(&team.said[team.channel], off);
    }
    __syncthreads();
    if (open) {
      int said = team.said[team.channel];
      once_more = !(said & (kOff | kHopeless));
      if (!said || (once_more && pass == kShootingPasses)) result = pass;
      open = said && !(said & kHopeless);
#pragma unroll
      for (int i = 0; i < n; ++i) start[i] += D[i];
    }
    if (!__syncthreads_or(open)) break;
  }
  if (inside && team.chunk == 0) problem.passes[s * problem.H + channel] = result;
}

// ---- Newton's method ----

inline constexpr int kNewtonSteps = 4;  // of a thread, in registers, and side by side

// Tile by tile: as many steps as the block's threads have between them. The guesses of all steps are in memory; a pass
// reads inputs and guesses and writes guesses, 20 bytes an element-step in fp32.
template <typename T, template <typename> typename Form>
__global__ void __launch_bounds__(kNewtonThreads, 1)
    gated_newton(Recurrence<T, GatedLine<T, Form>::n> problem, int group_bits) {
  using C = Accumulator<T>;
  using Row = GatedLine<T, Form>;
  constexpr int n = Row::n, L = kNewtonSteps;
  Team<C, n> team(group_bits);
  unsigned groups = unsigned((problem.H + team.channels - 1) >> group_bits);
  int64_t s = blockIdx.x / groups, channel = int64_t{blockIdx.x % groups} * team.channels + team.channel;
  bool inside = channel < problem.H;
  Row line(problem, s, inside ? channel : problem.H - 1);
  auto guess = [&](int64_t t, C (&state)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) state[i] = problem.guesses[i][line.at(t)];
  };

  int result = line.length > 0 ? kGivenUp : kNoPasses;
  bool open = inside && line.length > 0;
  for (int pass = 1; pass <= kNewtonPasses; ++pass) {
    int off = 0;
    if (team.chunk == 0) team.said[team.channel] = 0;
    int turn = 0;
    for (int64_t tile = 0; tile < line.length; tile += int64_t{team.chunks} * L, turn ^= 1) {
      int64_t first = tile + int64_t{team.chunk} * L;
      int count = int(open ? min(max(line.length - first, int64_t{0}), int64_t{L}) : 0);
      C before[n], carry[n] = {}, errors[kCovariance<n>] = {};  // carry and errors: of the tile's start, in chunk 0
#pragma unroll
      for (int i = 0; i < n; ++i) before[i] = line.start[i];
      if (team.chunk > 0) {
        if (count > 0 && pass == 1) line.guess(line.input(first - 1), before);
        else if (count > 0) guess(first - 1, before);
      } else if (tile > 0) {  // where the last tile ended; its last guess isn't in memory any more
#pragma unroll
        for (int i = 0; i < n; ++i) {
          before[i] = team.ends[(turn * n + i) * kMostChannels + team.channel];
          carry[i] = team.totals[i * kMostChannels + team.channel];
        }
#pragma unroll
        for (int i = 0; i < kCovariance<n>; ++i) errors[i] = team.totals[(n + i) * kMostChannels + team.channel];
      }

      typename Row::Input inputs[L] = {};
      C states[L][n] = {};
#pragma unroll
      for (int i = 0; i < L; ++i)
        if (i < count) {
          inputs[i] = line.input(first + i);
          if (pass > 1) guess(first + i, states[i]);
        }
      Affine<C, n> steps[L];
      auto all = Piece<C, n>::nothing();
#pragma unroll
      for (int i = 0; i < L; ++i) {
        steps[i] = Affine<C, n>::identity();
        if (i < count) {
          if (pass == 1) line.guess(inputs[i], states[i]);
          C u[3];
          Row::widened(inputs[i], u);
          line.cell.step(u, before, steps[i].A);
#pragma unroll
          for (int j = 0; j < n; ++j) {
            steps[i].b[j] = before[j] - states[i][j];
            before[j] = states[i][j];
          }
        }
        all.map = steps[i].after(all.map);
        carry_errors<n>(steps[i].A, all.errors);
        if (i < count) add_errors<n>(all.errors);
      }
      if (team.chunk == team.chunks - 1) {
#pragma unroll
        for (int i = 0; i < n; ++i) team.ends[((turn ^ 1) * n + i) * kMostChannels + team.channel] = before[i];
      }

      C d[n], next[n], more[kCovariance<n>];
      if (team.chunk == 0) {
        all.map.apply(carry, next);
        all.carry(errors, more);
#pragma unroll
        for (int i = 0; i < n; ++i) all.map.b[i] = next[i];
#pragma unroll
        for (int i = 0; i < kCovariance<n>; ++i) all.errors[i] = more[i];
      }
      team.across(all, d, more);
      if (team.chunk == 0) {
#pragma unroll
        for (int i = 0; i < n; ++i) d[i] = carry[i];
      } else {
#pragma unroll
        for (int i = 0; i < kCovariance<n>; ++i) errors[i] = more[i];
      }
#pragma unroll
      for (int i = 0; i < L; ++i)
        if (i < count) {
          carry_errors<n>(steps[i].A, errors), add_errors<n>(errors);
          if (!(trace<n>(errors) <= line.most_spread(line.start[0]))) off |= kOff;
          steps[i].apply(d, next);
#pragma unroll
          for (int j = 0; j < n; ++j) {
            d[j] = next[j];
            states[i][j] += d[j];
            if (!(fabs(d[j]) < kSmall<C> * max(fabs(states[i][j]), C(1)))) off |= d[j] == d[j] ? kOff : kHopeless;
          }
          line.store(problem.guesses, line.at(first + i), states[i]);
          if constexpr (sizeof(T) != sizeof(C)) line.store(problem.states, line.at(first + i), states[i]);
        }
    }
    if (off) atomicOr(&team.said[team.channel], off);
    __syncthreads();
    if (open) {
      int said = team.said[team.channel];
      if (!said) result = pass;
      open = said == kOff;
    }
    if (!__syncthreads_or(open)) break;
  }
  if (inside && team.chunk == 0) problem.passes[s * problem.H + channel] = result;
}

}  // namespace fastsparse::cuda
