// Recurrences that are affine in their states, h_t = A_t h_{t-1} + B_t, along all sequences and channels: device code.
//
// A line is one channel of one sequence. A block takes 2^line_bits lines that lie side by side, so that every access of
// a warp is of whole sectors, and goes through their time tile by tile. Each of its threads has a chunk of a tile, a few
// steps of one line: it joins their maps into one, the block joins those of all chunks (within a warp by shuffles, then
// in shared memory), and from its first state a chunk is gone through step by step. What a step reads stays in registers
// in between, and the next tile is on its way meanwhile: everything is read once. Where lines alone fill the machine a
// line is one chunk, and a step is all there is. Where even blocks of few lines don't, time is cut into segments, and
// each has a block: scan_maps joins the maps of each segment, and scan_steps finds from them where its own starts.
//
// A product of some A overflows where no state does, if states are near 0, or what shrinks them again comes later. Which
// products are taken differs from chunk to chunk, so each is asked: one that would start from what isn't finite takes the
// state that the chunk before it has come to instead. Where a state was finite, infinities and NaN are those of the loop.
//
// All sums are in a fixed order: the same call gives the same bits. The maps and steps themselves are those of a type
// `Steps`, which has
//   T, C, kStates, kHeld, kSums            element types, states of a line, steps of a chunk, sums over a line's steps
//   kBlocks                                for how many on a multiprocessor registers are to suffice
//   Step load(line, element, i)            what step i reads; its row is element / H
//   Affine map(line, step)                 what it does to a state
//   advance(line, step, state, element, kept)   a step itself; it writes, and adds to line.sums, if it is to be kept
//   start(line, state), finish(line, state)     the state before the first step, and what becomes of the last
#pragma once

#include "cuda/affine.cuh"
#include "cuda/sequences.cuh"

namespace fastsparse::cuda {

inline constexpr int kScanThreads = 256;  // of a block, at most

// How blocks share lines and time.
struct Time {
  const int64_t* bounds;  // sequence s has the rows from bounds[s] to bounds[s + 1]; or null: T rows each
  int64_t T, H, lines;
  int64_t segment;  // steps: whole tiles, where there is more than one
  int segments, line_bits;
  bool against;  // the last row of a sequence is its first step
};

// A thread's line.
template <typename C, int Sums> struct Line {
  int64_t s, channel, H, length, first, stride;  // the first step's element, and from each step to the next
  C sums[Sums > 0 ? Sums : 1] = {};

  __device__ __forceinline__ Line(const Time& time, int64_t line) : s(line / time.H), H(time.H) {
    channel = line - s * H;
    Span steps = span_of(time.bounds, s, time.T);
    length = steps.count;
    first = (time.against ? steps.first + length - 1 : steps.first) * H;
    stride = time.against ? -H : H;
  }
  __device__ __forceinline__ int64_t element(int64_t i) const { return first + i * stride; }
};

template <typename C, int N> __device__ __forceinline__ void advance(C (&state)[N], const Affine<C, N>& map) {
  C next[N];
  map.apply(state, next);
#pragma unroll
  for (int i = 0; i < N; ++i) state[i] = next[i];
}

template <typename C, int N> __device__ __forceinline__ bool finite(const C (&state)[N]) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < N; ++i) all = all && state[i] - state[i] == 0;
  return all;
}

template <typename C, int N> __device__ __forceinline__ void assign(C (&to)[N], const C (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// Where a thread stands: its line, its chunk, and the steps of the line that its block takes.
template <typename Steps> struct Standing {
  int width, slot, chunk, chunks;
  int64_t segment, number, begin, stop;  // number: the line's
  bool used;
  Line<typename Steps::C, Steps::kSums> line;

  __device__ __forceinline__ explicit Standing(const Time& time)
      : width(1 << time.line_bits), slot(int(threadIdx.x) & (width - 1)), chunk(int(threadIdx.x) >> time.line_bits),
        chunks(int(blockDim.x) >> time.line_bits), segment(blockIdx.x % unsigned(time.segments)),
        number((int64_t(blockIdx.x / unsigned(time.segments)) << time.line_bits) + slot), begin(segment * time.segment),
        used(number < time.lines), line(time, used ? number : time.lines - 1) {
    if (!used) line.length = 0;
    stop = begin + time.segment < line.length ? begin + time.segment : line.length;
  }
  // Past the last step of the block's lines in this segment.
  __device__ __forceinline__ int64_t block_stop(const Time& time) const {
    int64_t longest = time.T, end = begin + time.segment;
    if (time.bounds) {
      int64_t line = number - slot, last = line + width <= time.lines ? line + width - 1 : time.lines - 1;
      longest = 0;
      for (int64_t s = line / time.H; s <= last / time.H; ++s) {
        int64_t length = span_of(time.bounds, s, time.T).count;
        longest = length > longest ? length : longest;
      }
    }
    return longest < end ? longest : end;
  }
};

template <typename Steps> struct ScanShared {
  Affine<typename Steps::C, Steps::kStates> maps[kScanThreads];
  typename Steps::C states[kScanThreads][Steps::kStates];
};

// The map of each whole segment but the last: (segments, lines).
template <typename Steps>
__global__ void __launch_bounds__(kScanThreads, Steps::kBlocks)
    scan_maps(Steps steps, Time time, Affine<typename Steps::C, Steps::kStates>* maps) {
  using Map = Affine<typename Steps::C, Steps::kStates>;
  constexpr int held = Steps::kHeld;
  auto& shared = shared_storage<ScanShared<Steps>>();
  Standing<Steps> at(time);
  const int64_t share = time.segment / at.chunks, begin = at.begin + at.chunk * share;
  const int64_t stop = begin + share < at.stop ? begin + share : at.stop;
  typename Steps::Step now[held] = {}, next[held] = {};
  auto fetch = [&](int64_t first) {
#pragma unroll
    for (int l = 0; l < held; ++l)
      if (first + l < stop) next[l] = steps.load(at.line, at.line.element(first + l), first + l);
  };
  Map total = Map::identity();
  fetch(begin);
  for (int64_t i = begin; i < stop; i += held) {
#pragma unroll
    for (int l = 0; l < held; ++l) now[l] = next[l];
    fetch(i + held);
#pragma unroll
    for (int l = 0; l < held; ++l)
      if (i + l < stop) total = steps.map(at.line, now[l]).after(total);
  }
  shared.maps[threadIdx.x] = total;
  __syncthreads();
  if (at.chunk > 0 || !at.used) return;
  for (int c = 1; c < at.chunks; ++c) total = shared.maps[c * at.width + at.slot].after(total);
  maps[at.segment * time.lines + at.number] = total;
}

// All steps. maps: of the segments before, or null where there is one segment; sums: (segments, kSums, lines), or null.
template <typename Steps>
__global__ void __launch_bounds__(kScanThreads, Steps::kBlocks)
    scan_steps(Steps steps, Time time, const Affine<typename Steps::C, Steps::kStates>* maps,
               typename Steps::C* sums) {
  using C = typename Steps::C;
  using Map = Affine<C, Steps::kStates>;
  constexpr int held = Steps::kHeld, N = Steps::kStates;
  auto& shared = shared_storage<ScanShared<Steps>>();
  Standing<Steps> at(time);
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t block_stop = at.block_stop(time), tile = int64_t(at.chunks) * held;
  // Chunks of a warp are joined by shuffles, then units, which are a warp's, or chunks that are whole warps.
  const bool in_warp = at.width < kWarp;
  const int units = in_warp ? int(blockDim.x) / kWarp : at.chunks;
  const int unit = in_warp ? int(threadIdx.x) / kWarp : at.chunk;

  C state[N];
  steps.start(at.line, state);
  int64_t from = at.begin, block_from = at.begin;
  if (at.segment > 0) {
    C start[N];
    assign(start, state);
    if (at.used)
      for (int64_t m = 0; m < at.segment; ++m) advance(state, maps[m * time.lines + at.number]);
    if (!finite(state)) {  // perhaps by the maps alone: from the first step, then
      assign(state, start);
      from = 0;
    }
    if (__syncthreads_or(from < at.begin)) block_from = 0;
  }

  typename Steps::Step now[held] = {}, next[held] = {};
  auto has = [&](int64_t i) { return i >= from && i < at.stop; };
  auto fetch = [&](int64_t first) {
#pragma unroll
    for (int l = 0; l < held; ++l)
      if (has(first + l)) next[l] = steps.load(at.line, at.line.element(first + l), first + l);
  };
  fetch(block_from + at.chunk * held);
  for (int64_t begin = block_from; begin < block_stop; begin += tile) {
    const int64_t first = begin + at.chunk * held;
#pragma unroll
    for (int l = 0; l < held; ++l) now[l] = next[l];
    fetch(first + tile);
    C here[N];
    assign(here, state);
    if (at.chunks > 1) {
      Map joined = Map::identity();  // of all steps of the warp's chunks up to this one's end
#pragma unroll
      for (int l = 0; l < held; ++l)
        if (has(first + l)) joined = steps.map(at.line, now[l]).after(joined);
      for (int lanes = at.width; lanes < kWarp; lanes *= 2) {
        Map below = from_below(joined, lanes);
        if (lane >= lanes) joined = joined.after(below);
      }
      if (!in_warp || lane >= kWarp - at.width) shared.maps[unit * at.width + at.slot] = joined;
      __syncthreads();
      C end[N];
      assign(end, state);
      for (int u = 0; u < units; ++u) {
        if (u == unit) assign(here, end);
        advance(end, shared.maps[u * at.width + at.slot]);
      }
      if (in_warp) {
        Map below = from_below(joined, at.width);
        if (lane >= at.width) advance(here, below);
      }
      const bool sound = finite(state), lost = sound && !(finite(here) && finite(end));
      if (__syncthreads_or(lost)) {
        for (int c = 0; c < at.chunks; ++c) {
          if (sound && at.chunk == c) {
            if (!finite(here)) assign(here, shared.states[at.slot]);
            C walked[N];
            assign(walked, here);
#pragma unroll
            for (int l = 0; l < held; ++l)
              if (has(first + l)) advance(walked, steps.map(at.line, now[l]));
            assign(shared.states[at.slot], walked);
          }
          __syncthreads();
        }
        if (sound && !finite(end)) assign(end, shared.states[at.slot]);
      }
      assign(state, end);
    }
#pragma unroll
    for (int l = 0; l < held; ++l)
      if (has(first + l))
        steps.advance(at.line, now[l], here, at.line.element(first + l), first + l >= at.begin);
    if (at.chunks == 1) assign(state, here);
  }

  // A sequence without a step ends where it starts.
  const bool ends = at.stop == at.line.length && (at.begin < at.stop || at.segment == 0);
  if (at.used && at.chunk == 0 && ends) steps.finish(at.line, state);
  if constexpr (Steps::kSums > 0) {
    if (!sums) return;
    for (int w = 0; w < Steps::kSums; ++w) {
      __syncthreads();
      shared.states[threadIdx.x][0] = at.line.sums[w];
      __syncthreads();
      if (at.chunk > 0 || !at.used) continue;
      C sum = shared.states[at.slot][0];
      for (int c = 1; c < at.chunks; ++c) sum += shared.states[c * at.width + at.slot][0];
      sums[(at.segment * Steps::kSums + w) * time.lines + at.number] = sum;
    }
  }
}

}  // namespace fastsparse::cuda
