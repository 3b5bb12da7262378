#include "cpu/gated_recurrence.h"

#include <algorithm>
#include <cstring>

#include "cpu/edge/sequences.h"
#include "gated.h"
#include "solvers.h"

namespace fastsparse::edge {

namespace {

// All weights' rows one after the other, in the accumulation type.
const void* rows_of(const std::vector<Tensor>& weights, ScalarType accumulator, Scratch& scratch) {
  int64_t count = 0, bytes = accumulator == ScalarType::Double ? 8 : 4;
  for (const Tensor& weight : weights) count += weight.numel();
  char* rows = scratch.get<char>(count * bytes);
  for (char* to = rows; const Tensor& weight : weights) {
    Tensor wide = as_contiguous(weight, accumulator);
    if (wide.numel()) std::memcpy(to, wide.const_data_ptr(), wide.numel() * bytes);
    to += wide.numel() * bytes;
  }
  return rows;
}

// Steps of a sequence, on average.
int64_t steps_of(const Sequences& sequences) {
  return sequences.bounds ? sequences.T / std::max<int64_t>(sequences.count, 1) : sequences.T;
}

void step_by_step(const GatedRecurrenceArgs& args) {
  auto run = FASTSPARSE_KERNEL(gated_recurrence);
  int64_t S = args.sequences.count, H = args.H, bytes = args.dtype == DType::f64 ? 8 : 4;
  int64_t work = steps_of(args.sequences) * bytes * 4;  // of a channel
  int64_t threads = int64_t(torch::stable::get_num_threads());
  if (args.sequences.bounds || H * bytes > 128) {
    // A task of fewer than two vectors is hardly faster: each waits for its own last step.
    int64_t width = 128, blocks = 1;
    while (blocks = (H + width - 1) / width, width > 32 && S * blocks < 2 * threads) width /= 2;
    parallel(S * blocks, rows_a_task(width * work), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t s = i / blocks, first = i % blocks * width;
        run(args, {s, s + 1}, {first, std::min(first + width, H)});
      }
    });
    return;
  }
  int64_t together = std::clamp<int64_t>((S + threads - 1) / threads, 1, kSequencesTogether);
  parallel((S + together - 1) / together, rows_a_task(together * H * work), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin * together; s < std::min(end * together, S); s += together)
      run(args, {s, std::min(s + together, S)}, {0, H});
  });
}

// What `auto` takes. Step by step, a vector of channels is as slow as one channel; by shooting every channel costs its
// share. (Zen 4, two threads, two passes, GRU in fp32, ms step by step / by shooting: at B=1 T=8192 .34 / .07 for H=1,
// .33 / .09 for 2, .35 / .20 for 4, .33 / .38 for 8; at B=8 T=8192 H=1 .60 / .25; at B=1 H=1 .10 / .04 for T=2048,
// .041 / .031 for 512. The LSTM is much alike. Slow gates take more passes, and chaos all of them for nothing: hence
// only the clear cases.)
bool shooting_pays(const GatedRecurrenceArgs& args) {
  return args.H <= 2 && args.sequences.count * args.H <= 16 && steps_of(args.sequences) >= 2048;
}

// By Newton's method or by shooting, and where that doesn't certify an answer, step by step.
void parallel_in_time(const GatedRecurrenceArgs& args, int64_t states, Solver solver) {
  auto loop = FASTSPARSE_KERNEL(gated_recurrence);
  auto run = solver == Solver::newton ? FASTSPARSE_KERNEL(gated_recurrence_by_newton)
                                      : FASTSPARSE_KERNEL(gated_recurrence_by_shooting);
  struct Task { int64_t sequence; Range channels; int64_t rows; };
  std::vector<Task> tasks;
  int64_t lanes = kRowBytes / (args.dtype == DType::f64 ? 8 : 4), S = args.sequences.count, H = args.H;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t* bounds = args.sequences.bounds;
    int64_t steps = bounds ? bounds[s + 1] - bounds[s] : args.sequences.T;
    if (steps == 0) continue;
    TimePlan plan = time_plan(steps, lanes, H);
    int64_t rows = solver == Solver::newton ? newton_rows(states, plan.length) : shooting_rows(states);
    for (int64_t h = 0; h < H; h += plan.channels) tasks.push_back({s, {h, std::min(h + plan.channels, H)}, rows});
  }
  parallel(int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i)
      run(args, tasks[i].sequence, tasks[i].channels, scratch.get<char>(tasks[i].rows * kRowBytes));
  });
  int64_t width = 64, blocks = (H + width - 1) / width;
  parallel(S * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t s = i / blocks, first = i % blocks * width, last = std::min(first + width, H);
      auto failed = [&](int64_t h) { return args.passes[s * H + h] == kGivenUp; };
      for (int64_t end; first < last; first = end) {  // neighbours together; what is certified is left alone
        end = first + 1;
        if (!failed(first)) continue;
        while (end < last && failed(end)) ++end;
        loop(args, {s, s + 1}, {first, end});
      }
    }
  });
}

}  // namespace

std::vector<Tensor> gated_recurrence(const GatedCall& call, int64_t solver) {
  InFloatMode mode(Subnormals::as_asked);
  Solver chosen = option_of<Solver>(call.op, "solver", solver, kSolvers);
  const Tensor& u = call.u;
  int64_t B = u.size(0), T = u.size(1), H = u.size(3);
  Tensor bounds, inputs = with_unit_channels(u);
  std::vector<Tensor> starts, out;
  Scratch scratch;
  GatedRecurrenceArgs args{.cell = call.cell,
                           .sequences = sequences_of(call.op, call.cu_seqlens, B, T, bounds),
                           .u = series_of(inputs),
                           .weights = rows_of(call.weights, accumulator_of(u.scalar_type()), scratch),
                           .start = {},
                           .states = {},
                           .passes = nullptr,
                           .H = H,
                           .dtype = dtype_of(u)};
  for (size_t i = 0; i < call.starts.size(); ++i) {
    Tensor states = allocate({B, T, H}, u.scalar_type());
    prefer_huge_pages(states.mutable_data_ptr(), size_t(states.numel()) * states.element_size());
    args.states[i] = series_of(states);
    out.push_back(states);
    if (!call.starts[i]) continue;
    starts.push_back(with_unit_channels(*call.starts[i]));
    args.start[i] = states_of(starts.back());
  }
  Tensor passes = allocate({args.sequences.count, H}, ScalarType::Int);
  args.passes = passes.mutable_data_ptr<int32_t>();
  std::fill_n(args.passes, passes.numel(), kNoPasses);
  if (chosen == Solver::automatic) chosen = shooting_pays(args) ? Solver::shooting : Solver::sequential;
  if (u.numel() && chosen == Solver::sequential) step_by_step(args);
  else if (u.numel()) parallel_in_time(args, int64_t(call.starts.size()), chosen);
  out.push_back(passes);
  return out;
}

}  // namespace fastsparse::edge
