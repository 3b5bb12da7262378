// How the kernels of a gated recurrence are launched.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <optional>

#include "cuda/edge.h"
#include "cuda/gated_recurrence.cuh"
#include "cuda/rows.h"

namespace fastsparse::cuda {

// What `auto` takes. A model, nothing measured: step by step is 90 to 100 ns a step however few the channels
// (gated_recurrence.cuh), and 16 bytes an element-step (fp32) where they are many. Shooting's steps are side by side,
// but it reads its inputs twice or thrice: 28 to 44 bytes, 6.5 to 10 ps at 4.3 TB/s, which 95 ns are worth of 9500 to
// 14500 channels of sequences; 8000 to 13000 where states are pairs. In halves it is half the bytes, but instructions
// count: a warp's step is 65 of them (an LSTM's 100), a multiprocessor has four a cycle, and 132 of those take 4.5 to
// 7 ps (7 to 10), worth 13000 to 20000 channels (9500 to 14500). Taken: 64 channels a multiprocessor, 96 in halves, and
// as many steps as are worth its barriers and second launch, some 20 us. Newton's method moves more bytes in more
// passes, always. `steps` are those of all sequences, whose lengths aren't known here.
inline Solver automatic_solver(const Call& call, bool halves, int64_t S, int64_t steps, int64_t H) {
  constexpr int64_t kManySteps = 512;
  bool few = S * H < (halves ? 96 : 64) * call.multiprocessors();
  return few && steps >= kManySteps * S ? Solver::shooting : Solver::sequential;
}

// u (B, T, 3, H); starts and states in the cell's order. Fills the states (B, T, H) and passes (S, H).
template <template <typename> typename Form, size_t n>
void solve_gated(const char* op, const Tensor& u, const Tensor& weight, const std::optional<Tensor>& peephole,
                 const std::array<std::optional<Tensor>, n>& starts, const std::optional<Tensor>& cu_seqlens,
                 int64_t position, const std::array<Tensor, n>& states, const Tensor& passes) {
  Call call(u);
  int64_t S = passes.size(0), steps = u.size(1), H = u.size(3);
  Solver solver = option_of<Solver>(op, "solver", position, kSolvers);
  if (S == 0 || H == 0) return;
  bool halves = accumulator_of(u.scalar_type()) != u.scalar_type();
  if (solver == Solver::automatic) solver = automatic_solver(call, halves, S, cu_seqlens ? steps : steps * S, H);
  if (steps == 0) solver = Solver::sequential;

  auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(as_contiguous(*tensor, tensor->scalar_type())) : std::nullopt;
  };
  Tensor weights = *contiguous(weight);
  std::optional<Tensor> peepholes = contiguous(peephole), bounds = contiguous(cu_seqlens);
  std::array<std::optional<Tensor>, n> first;
  for (size_t i = 0; i < n; ++i) first[i] = contiguous(starts[i]);

  with_type(dtype_of(u), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    Recurrence<T, int(n)> problem{};
    problem.u = data<T>(u);
    problem.row_stride = u.stride(0), problem.step_stride = u.stride(1);
    problem.gate_stride = u.stride(2), problem.channel_stride = u.stride(3);
    problem.weight = data<T>(weights);
    problem.peephole = peepholes ? data<T>(*peepholes) : nullptr;
    problem.bounds = bounds ? data<int64_t>(*bounds) : nullptr;
    problem.steps = steps, problem.H = H;
    problem.passes = mutable_data<int32_t>(passes);
    std::array<std::optional<Tensor>, n> scratch;
    for (size_t i = 0; i < n; ++i) {
      problem.start[i] = first[i] ? data<T>(*first[i]) : nullptr;
      problem.states[i] = mutable_data<T>(states[i]);
      if (solver != Solver::newton) continue;
      if (halves) scratch[i] = allocate(u, {u.size(0), steps, H}, accumulator_of(u.scalar_type()));
      problem.guesses[i] = mutable_data<C>(scratch[i] ? *scratch[i] : states[i]);
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
    int64_t most = newton ? kNewtonThreads : kShootingThreads<C, int(n)>, least = newton ? kNewtonSteps : kLeastChunk;
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
                size_t(parallel_shared_bytes<C, int(n)>(int(threads))), problem, group_bits);
    step_by_step(true);
  });
}

}  // namespace fastsparse::cuda
