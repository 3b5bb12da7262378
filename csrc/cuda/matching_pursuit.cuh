// Matching pursuit through the Gram matrix: device code.
//
// G = V V' of the atoms' directions V and the scores s = x V' come from the vendor's library. Then a block follows one
// row through all of its steps: taking an atom j, a = c |w_j| times its direction, changes the scores by -a G[j], one
// row of G streamed through. Where shared memory has room the scores live there, with the residual.
//
// Bytes, a row and step: M of G, read once; 2 M of scores written and read in shared memory. Floor: N k M 4 bytes, at
// N=4096, M=16384, k=32 in fp32 8.6 GB, 2 ms at 4.3 TB/s where no row of G is found in L2 (all are 1 GB). The products:
// 2 M (M + N) D operations, at D=768 0.5 TFLOP, which tensor cores do three times over in 2 ms at 790 TFLOP/s; without G
// they are 2 k M N D, 3.3 TFLOP, three times over in 12.5 ms.
//
// The bound on what scores are off (pursuit.cuh) after a step. With p, e, u, W as there, r' = r - c w the
// residual after it and B the bound before it, a score changes by fl(s - fl(a G)), where
//   |a G - c w.w^|                   <= |a| W^2 (1.01 p + 3 e + u)       G = fl(v.v), v off by e, a by e or u
//   r' rounds: r' = r - c w + d,  w^.d <= u W (|a| W + |r'|)
//   the product and the difference   <= u |a| W^2 (1 + p) + u (W |r'| + B')
// which sums to B' <= (B + |a| W^2 (1.01 p + 4 e + 4 u) + 3 u W |r'|) (1 + 2 u).
#pragma once

#include "cuda/pursuit.cuh"

namespace fastsparse::cuda {

inline constexpr int kGramInFlight = 4;  // packets of G that a thread waits for together
// What following is compiled for: 80 registers a thread, so that a multiprocessor holds three blocks of 256 threads. It
// has shared memory for as many rows of 16384 scores.
inline constexpr int kFollowBound = 768;

// Takes a times the scores' row of G from them; returns the largest key, as best_key does.
template <typename T>
__device__ __forceinline__ Accumulator<T> follow(PursuedRow<T>& row, const Accumulator<T>* gram, Accumulator<T> a) {
  using C = Accumulator<T>;
  const Rounding& rounding = row.goal.rounding;
  double square = row.longest * row.longest, unit = rounding.unit;
  double step = fabs(a) * square * (1.01 * rounding.product + 4 * rounding.direction + 4 * unit);
  row.error = (row.error + step + 3 * unit * row.longest * row.length) * (1 + 2 * unit) + rounding.lost;

  constexpr int size = Packet<C>::size;
  const int apart = int(blockDim.x) * size;
  C best = -C(INFINITY);
#pragma unroll 1
  for (int v = int(threadIdx.x) * size; v < row.latents; v += kGramInFlight * apart) {
    Packet<C> changes[kGramInFlight];
#pragma unroll
    for (int i = 0; i < kGramInFlight; ++i)
      if (v + i * apart < row.latents) changes[i] = load_packet(gram + v + i * apart);
#pragma unroll
    for (int i = 0; i < kGramInFlight; ++i) {
      C* scores = row.scores + v + i * apart;
      if (v + i * apart >= row.latents) break;
      Packet<C> packet = load_packet(scores);
#pragma unroll
      for (int e = 0; e < size; ++e) packet.value[e] -= a * changes[i].value[e];
      store_packet(scores, packet);
      row.update_best(best, packet);
    }
  }
  return over_block(best, Most());
}

// All steps of a row. A block a row; Resident: scores and residual are in shared memory meanwhile.
template <typename T, bool Resident>
__global__ void __launch_bounds__(kFollowBound)
    matching_pursuit_follow(Atoms<T> atoms, Goal<T> goal, Work<Accumulator<T>> work, const Accumulator<T>* gram) {
  using C = Accumulator<T>;
  int64_t n = blockIdx.x;
  C *residual = work.residuals + n * work.depth, *scores = work.scores + n * work.latents;
  if constexpr (Resident) {
    C* shared = dynamic_shared<C>();
    const int thread = int(threadIdx.x) * Packet<C>::size, threads = int(blockDim.x) * Packet<C>::size;
    for (int v = thread; v < work.latents; v += threads) store_packet(shared + v, load_packet(scores + v));
    scores = shared;
    shared += work.latents;
    for (int d = thread; d < work.depth; d += threads) store_packet(shared + d, load_packet(residual + d));
    residual = shared;
    __syncthreads();
  }

  PursuedRow<T> row(atoms, goal, residual, scores, work.latents);
  row.measure();
  row.trust_product();
  C best = row.best_key();
  int64_t t = 0;
  for (; t < goal.k; ++t) {
    int32_t latent = 0;
    C value = row.step(best, latent);
    if (value == 0) break;
    if (threadIdx.x == 0) goal.write(n, t, value, latent);
    if (t + 1 == goal.k) continue;
    C a = atoms.squares ? C(double(value) * sqrt(atoms.squares[latent])) : value;
    best = follow(row, gram + int64_t{latent} * work.latents, a);
  }
  for (t += threadIdx.x; t < goal.k; t += blockDim.x) goal.write(n, t, C(0), 0);
  if constexpr (Resident) {
    C* out = work.residuals + n * work.depth;
    for (int d = threadIdx.x; d < atoms.D; d += blockDim.x) out[d] = residual[d];
  }
}

}  // namespace fastsparse::cuda
