#include "cuda/gated_recurrence.cuh"

#include <algorithm>
#include <bit>

#include "cuda/edge.h"
#include "cuda/rows.h"
#include "gated.h"

namespace fastsparse::cuda {

namespace {

// What `auto` takes. A model, nothing measured: step by step is 90 to 100 ns a step however few the channels
// (gated_recurrence.cuh), and 16 bytes an element-step (fp32) where they are many. Shooting's steps are side by side,
// but it reads its inputs twice or thrice: 28 to 44 bytes, 6.5 to 10 ps at 4.3 TB/s, which 95 ns are worth of 9500 to
// 14500 channels of sequences; 8000 to 13000 where states are pairs. In halves it is half the bytes, but instructions
// count: a warp's step is 65 of them (an LSTM's 100), a multiprocessor has four a cycle, and 132 of those take 4.5 to
// 7 ps (7 to 10), worth 13000 to 20000 channels (9500 to 14500). Taken: 64 channels a multiprocessor, 96 in halves, and
// as many steps as are worth its barriers and second launch, some 20 us. Newton's method moves more bytes in more
// passes, always. `steps` are those of all sequences, whose lengths aren't known here.
Solver automatic_solver(const Call& call, bool halves, int64_t S, int64_t steps, int64_t H) {
  constexpr int64_t kManySteps = 512;
  bool few = S * H < (halves ? 96 : 64) * call.multiprocessors();
  return few && steps >= kManySteps * S ? Solver::shooting : Solver::sequential;
}

template <typename T, template <typename> typename Form>
void solve(const Call& call, const GatedCall& given, Solver solver, const std::vector<Tensor>& out) {
  using C = Accumulator<T>;
  constexpr int n = GatedLine<T, Form>::n;
  const Tensor &u = given.u, &passes = out[n];
  int64_t S = passes.size(0), steps = u.size(1), H = u.size(3);
  std::vector<Tensor> kept;
  auto contiguous = [&](const Tensor& tensor) -> const Tensor& {
    return kept.emplace_back(as_contiguous(tensor, tensor.scalar_type()));
  };
  Recurrence<T, n> problem{};
  problem.u = data<T>(u);
  problem.row_stride = u.stride(0), problem.step_stride = u.stride(1);
  problem.gate_stride = u.stride(2), problem.channel_stride = u.stride(3);
  problem.weight = data<T>(contiguous(given.weights[0]));
  if (given.weights.size() > 1) problem.peephole = data<T>(contiguous(given.weights[1]));
  if (given.cu_seqlens) problem.bounds = data<int64_t>(contiguous(*given.cu_seqlens));
  problem.steps = steps, problem.H = H;
  problem.passes = mutable_data<int32_t>(passes);
  for (int i = 0; i < n; ++i) {
    if (given.starts[i]) problem.start[i] = data<T>(contiguous(*given.starts[i]));
    problem.states[i] = mutable_data<T>(out[i]);
    if (solver != Solver::newton) continue;
    if constexpr (sizeof(T) == sizeof(C)) problem.guesses[i] = problem.states[i];
    else problem.guesses[i] = mutable_data<C>(kept.emplace_back(allocate(u, {u.size(0), steps, H}, ScalarType::Float)));
  }

  auto blocks = [&](int64_t channels) { return S * ((H + channels - 1) / channels); };
  auto step_by_step = [&](bool redo) {
    // Few lines are spread over all multiprocessors; a sequence of few channels then has a block of its own, and no
    // lane waits for another's end. While a warp's step waits, its scheduler can issue another's: eight blocks of up
    // to a warp are as fast as one.
    int64_t lines = S * H, threads = std::min<int64_t>(kWarp, std::bit_ceil(uint64_t(H)));
    while (threads < kSequentialThreads && lines > 8 * call.multiprocessors() * threads) threads *= 2;
    call.launch("gated_sequential", gated_sequential<T, Form>, (lines + threads - 1) / threads, threads, 0, problem,
                lines, redo);
  };
  if (solver == Solver::sequential) return step_by_step(false);

  bool newton = solver == Solver::newton;
  int64_t most = newton ? kNewtonThreads : kShootingThreads<C, n>, least = newton ? kNewtonSteps : kLeastChunk;
  // As many channels a block as fill a sector of memory, 32 bytes; fewer, with more chunks each, where there are few
  // blocks and chunks are long.
  int group_bits = sizeof(T) == 2 ? 4 : sizeof(T) == 4 ? 3 : 2;
  while (group_bits > 0 && (int64_t{1} << (group_bits - 1)) >= H) --group_bits;
  while (group_bits > 0 && blocks(int64_t{1} << group_bits) < call.multiprocessors() &&
         steps > 4 * least * (most >> group_bits))
    --group_bits;
  int64_t wanted = ((steps + least - 1) / least) << group_bits;
  int64_t threads = std::min(most, (wanted + kWarp - 1) / kWarp * kWarp);
  call.launch(newton ? "gated_newton" : "gated_shooting",
              newton ? gated_newton<T, Form> : gated_shooting<T, Form>, blocks(int64_t{1} << group_bits), threads,
              size_t(parallel_shared_bytes<C, n>(int(threads))), problem, group_bits);
  step_by_step(true);
}

}  // namespace

std::vector<Tensor> gated_recurrence(const GatedCall& given, int64_t position) {
  const Tensor& u = given.u;
  Call call(u);
  int64_t B = u.size(0), steps = u.size(1), H = u.size(3), S = given.cu_seqlens ? given.cu_seqlens->size(0) - 1 : B;
  Solver solver = option_of<Solver>(given.op, "solver", position, kSolvers);
  std::vector<Tensor> out;
  for (size_t i = 0; i < given.starts.size(); ++i) out.push_back(allocate(u, {B, steps, H}, u.scalar_type()));
  out.push_back(allocate(u, {S, H}, ScalarType::Int));
  if (S == 0 || H == 0) return out;
  bool halves = accumulator_of(u.scalar_type()) != u.scalar_type();
  if (solver == Solver::automatic)
    solver = automatic_solver(call, halves, S, given.cu_seqlens ? steps : steps * S, H);
  if (steps == 0) solver = Solver::sequential;
  with_cell(given.cell, [&]<template <typename> typename Form>() {
    with_type(dtype_of(u), [&](auto tag) { solve<typename decltype(tag)::type, Form>(call, given, solver, out); });
  });
  return out;
}

}  // namespace fastsparse::cuda
