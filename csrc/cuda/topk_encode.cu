#include "cuda/topk_encode.cuh"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "topk_encode.h"
#include "cuda/edge.h"
#include "cuda/knobs.h"
#include "cuda/latents.h"
#include "cuda/rows.h"
#include "cuda/screen.cuh"
#include "cuda/stripes.h"
#include "cuda/tensor_cores.h"

namespace fastsparse::cuda {

namespace {

constexpr int64_t kListBytes = int64_t{64} << 20;  // of candidates; a larger k takes fewer tokens at a time
constexpr int64_t kMostRefined = 16384;            // the largest D of which a token fits in 64 kB of shared memory
constexpr int kThreads = 256;

// The places that each row of ranks (rows, k) comes from when sorted: descending, ties in place.
Tensor sorted_places(const Tensor& ranks) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(ranks), from(std::optional<bool>(true)), from(int64_t{1}), from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

// One group of a call for tensors of one type.
template <typename T> class Encoder {
  using C = Accumulator<T>;

 public:
  Encoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t k, Activation activation,
          const std::optional<Tensor>& scale, const std::optional<Tensor>& mask, const Output<T>& output)
      : call_(x), x_(x), weight_(weight), N_(x.size(0)), D_(x.size(1)), M_(weight.size(0)), k_(k), output_(output),
        memory_(call_, weight, bias, scale, mask, activation == Activation::abs), latents_(memory_.latents),
        keyed_(memory_.keyed) {
    if (M_ >= std::numeric_limits<int32_t>::max() - 4096)
      throw std::invalid_argument("topk_encode: weight must have fewer than 2^31 - 4096 rows, got " +
                                  std::to_string(M_));
  }

  void run() {
    if (N_ == 0) return;
    bool screened = screens();
    capacity_ = std::min(M_, screened ? 6 * k_ + 256 : exact_capacity());
    plan();
    if constexpr (std::is_same_v<T, float>)
      if (screened) plan_screen();
    for (int64_t n = 0; n < N_; n += rows_) {
      int64_t rows = std::min(rows_, N_ - n);
      if (!screened) plain(n, rows);
      else if constexpr (std::is_same_v<T, float>) screen(n, rows);
    }
  }

 private:
  Tensor scratch(int64_t count, ScalarType dtype) const { return allocate(x_, {count}, dtype); }
  static constexpr ScalarType accumulator() { return sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float; }
  static constexpr ScalarType order_type() { return sizeof(C) == 8 ? ScalarType::Long : ScalarType::Int; }

  // Room for the k best and as many again, so that reductions are few, or at least for a group of latents.
  int64_t exact_capacity() const { return std::min(M_, std::max(2 * k_, round_up(k_ + kGroup<C>, kWarp))); }

  bool screens() const {
    bool possible = std::is_same_v<T, float> && D_ > 0 && D_ <= kMostRefined && k_ <= kMostSorted;
    if (knobs.screening >= 0 || !possible) return possible && knobs.screening > 0;
    // A product of fp32 must cost more than rounding the weight does (that is memory-bound: a few tokens are not worth
    // it), than the exact scores of the survivors, and than a handful of launches.
    return N_ >= 128 && D_ >= 128 && M_ >= 4096 && k_ <= M_ / 16;
  }

  // Rows and latents to take at a time, and scratch for them.
  void plan() {
    int64_t entry_bytes = 2 * sizeof(C) + sizeof(int32_t);
    int64_t fitting = std::max<int64_t>(1, kListBytes / (capacity_ * entry_bytes));
    rows_ = block_rows(N_, fitting);
    stripe_ = stripe_latents<C>(call_, rows_, M_, kGroup<C>);
    splits_ = k_ > kMostSorted ? 1 : stripe_splits(call_, rows_, stripe_);
    scores_ = scratch(rows_ * stripe_, accumulator());
    int64_t lists = rows_ * splits_;
    first_ = scratch(lists * capacity_, order_type());
    second_ = scratch(lists * capacity_, accumulator());
    latent_ = scratch(lists * capacity_, ScalarType::Int);
    count_ = scratch(lists, ScalarType::Int);
    threshold_ = scratch(lists, order_type());
    lists_ = {int(k_), int(capacity_), mutable_data<Order<C>>(*first_), mutable_data<C>(*second_),
              mutable_data<int32_t>(*latent_), mutable_data<int32_t>(*count_), mutable_data<Order<C>>(*threshold_)};
  }

  // Enough threads for a row's candidates, few enough to share barriers cheaply.
  int64_t select_threads() const { return splits_ * capacity_ <= 512 ? 64 : kSelectThreads; }
  int64_t warps_blocks(int64_t warps) const { return ceil_div(warps, kFilterThreads / kWarp); }

  // Rows [begin, begin + rows) from exact scores.
  void plain(int64_t begin, int64_t rows) {
    Tensor tokens = rows_of(x_, begin, rows);
    for (int64_t m = 0; m < M_; m += stripe_) {
      int64_t count = std::min(stripe_, M_ - m);
      product(tokens, rows_of(weight_, m, count), scores_of(*scores_, rows, count, stripe_));
      Stripe<C> stripe{data<C>(*scores_), stripe_, int(m), int(count)};
      call_.launch("topk_encode_filter", keyed_ ? topk_encode_filter<C, true> : topk_encode_filter<C, false>,
                   warps_blocks(rows * splits_), kFilterThreads, 0, lists_, stripe, latents_, int(rows), int(splits_));
    }
    select(begin, rows);
  }

  Output<T> output(int64_t begin) const {
    int64_t skipped = begin * output_.stride;
    return {output_.values + skipped, output_.indices + skipped, output_.stride, output_.first, output_.relu};
  }

  void select(int64_t begin, int64_t rows) {
    if (k_ <= kMostSorted) {
      call_.launch("topk_encode_select", topk_encode_select<T>, rows, select_threads(), 0, lists_, int(splits_),
                   output(begin), latents_.eligible, M_);
      return;
    }
    Tensor ranks = allocate(x_, {rows, k_}, ScalarType::Long);
    call_.launch("topk_encode_rank", topk_encode_rank<C>, warps_blocks(rows), kFilterThreads, 0, lists_, int(rows),
                 latents_.eligible, M_, mutable_data<int64_t>(ranks));
    Tensor places = torch::stable::contiguous(sorted_places(ranks));
    call_.launch("topk_encode_write", topk_encode_write<T>, ceil_div(rows * k_, kThreads), kThreads, 0, lists_, rows,
                 data<int64_t>(places), output(begin));
  }

  // ---- fp32 through bf16 ----

  void plan_screen() {
    x_ = with_unit_stride(x_);
    weight_ = with_unit_stride(weight_);
    padded_ = round_up(D_, 8);  // whole packets of bf16
    error_ = knobs.screening == 2 ? std::numeric_limits<float>::infinity() : accumulation_error(D_);
    int64_t group = kGroup<C>, stripe = round_up(stripe_, group);
    tokens_ = allocate(x_, {rows_, padded_}, ScalarType::BFloat16);
    atoms_ = allocate(x_, {std::min(stripe_, M_), padded_}, ScalarType::BFloat16);
    token_norms_ = scratch(2 * rows_, accumulator());
    terms_ = scratch(3 * stripe + 4 * stripe / kRoundGroup, accumulator());
    float* terms = mutable_data<float>(*terms_);
    brackets_ = {terms, terms + stripe, terms + 2 * stripe, reinterpret_cast<Packet<float>*>(terms + 3 * stripe)};
    // The second screen has the first one's lists. Of exact scores, as many as have room in these.
    int64_t blocks = std::max<int64_t>(ceil_div(rows_, kRescueRows), 2 * call_.multiprocessors());
    int64_t most_lists = std::min<int64_t>(rows_ * splits_ * capacity_ / exact_capacity(),
                                           std::max<int64_t>(rows_, kRescueRows * blocks));
    rescue_state_ = scratch(2 * rows_ + 2 + 2 * most_lists, ScalarType::Int);
    int32_t* state = mutable_data<int32_t>(*rescue_state_);
    int32_t* totals = knobs.undecided ? reinterpret_cast<int32_t*>(knobs.undecided) : state + 2 * rows_;
    int groups = int(ceil_div(M_, group));
    first_left_ = {state, totals, int(blocks), int(rows_ * splits_), groups};
    second_left_ = {state + rows_, totals + 1, int(blocks), int(most_lists), groups};
    rescue_lists_ = lists_;
    rescue_lists_.capacity = int(exact_capacity());
    rescue_lists_.count = state + 2 * rows_ + 2;
    rescue_lists_.threshold = reinterpret_cast<uint32_t*>(rescue_lists_.count + most_lists);
  }

  // Rows [begin, begin + rows) by screen, certify and refine; then those that it can't decide.
  void screen(int64_t begin, int64_t rows) {
    Rows exact{data<float>(x_) + begin * x_.stride(0), data<float>(weight_), x_.stride(0), weight_.stride(0), D_,
               takes_packets<float>(x_, D_) && takes_packets<float>(weight_, D_)};
    auto* norms = reinterpret_cast<Norms*>(mutable_data<float>(*token_norms_));
    call_.launch("topk_encode_round_tokens", topk_encode_round_tokens, ceil_div(rows, kRoundGroup), kRoundThreads, 0,
                 exact.x, exact.x_stride, rows, D_, exact.packets, mutable_data<bf16>(*tokens_), padded_, norms,
                 first_left_.total);
    Tensor tokens = rows_of(*tokens_, 0, rows);
    for (int64_t m = 0; m < M_; m += stripe_) {
      int64_t count = std::min(stripe_, M_ - m);
      call_.launch("topk_encode_round_atoms", topk_encode_round_atoms, round_up(count, kGroup<C>) / kRoundGroup,
                   kRoundThreads, 0, exact.weight, exact.weight_stride, D_, exact.packets, int(m), int(count), latents_,
                   mutable_data<bf16>(*atoms_), padded_, brackets_);
      product(tokens, rows_of(*atoms_, 0, count), scores_of(*scores_, rows, count, stripe_));
      Stripe<float> stripe{data<float>(*scores_), stripe_, int(m), int(count)};
      call_.launch("topk_encode_screen", keyed_ ? topk_encode_screen<true> : topk_encode_screen<false>,
                   warps_blocks(rows * splits_), kFilterThreads, 0, lists_, stripe, latents_, brackets_, norms, D_, error_,
                   int(rows), int(splits_));
    }
    if (knobs.counts) {
      Tensor told = torch::stable::from_blob(reinterpret_cast<int32_t*>(knobs.counts) + begin * splits_,
                                             {rows * splits_}, {1}, x_.device(), ScalarType::Int);
      torch::stable::copy_(told, rows_of(*count_, 0, rows * splits_));
    }
    call_.launch("topk_encode_refine", topk_encode_refine, rows, kRefineThreads, D_ * sizeof(float), lists_,
                 int(splits_), exact, latents_);
    call_.launch("topk_encode_select_screened", topk_encode_select_screened, rows, select_threads(), 0, lists_,
                 int(splits_), output(begin), latents_.eligible, M_, first_left_);
    rescue(begin, rows, exact, norms);
  }

  void rescue(int64_t begin, int64_t rows, const Rows& exact, const Norms* norms) {
    float error = accumulation_error(3 * kRescueDepth) + float(ceil_div(D_, kRescueDepth)) * 0x1p-24f;
    call_.launch("topk_encode_screen_again", keyed_ ? topk_encode_screen_again<true> : topk_encode_screen_again<false>,
                 first_left_.blocks, kRescueThreads, 0, lists_, exact, latents_, norms, error, int(M_), first_left_);
    call_.launch("topk_encode_refine_again", topk_encode_refine_again, rows, kRefineThreads, D_ * sizeof(float), lists_,
                 exact, latents_, output(begin), M_, first_left_, second_left_);
    call_.launch("topk_encode_rescue", keyed_ ? topk_encode_rescue<true> : topk_encode_rescue<false>,
                 second_left_.blocks, kRescueThreads, 0, rescue_lists_, exact, latents_, int(M_), second_left_);
    call_.launch("topk_encode_select_rescued", topk_encode_select_rescued, rows, kSelectThreads, 0, rescue_lists_,
                 second_left_, output(begin), latents_.eligible, M_);
  }

  Call call_;
  Tensor x_, weight_;
  int64_t N_, D_, M_, k_, capacity_ = 0, rows_ = 0, stripe_ = 0, splits_ = 1, padded_ = 0;
  Output<T> output_;
  LatentMemory<T> memory_;
  Latents<C> latents_;
  bool keyed_;
  float error_ = 0;  // of the product of bf16
  Lists<C> lists_{}, rescue_lists_{};
  Brackets brackets_{};
  Undecided first_left_{}, second_left_{};
  std::optional<Tensor> scores_, first_, second_, latent_, count_, threshold_;
  std::optional<Tensor> tokens_, atoms_, token_norms_, terms_, rescue_state_;
};

}  // namespace

std::tuple<Tensor, Tensor> topk_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       int64_t k, int64_t activation,
                                       const std::optional<Tensor>& latent_scale,
                                       const std::optional<Tensor>& latent_mask, int64_t groups) {
  auto chosen = option_of<Activation>("topk_encode", "activation", activation, kActivations);
  int64_t size = group_size(weight.size(0), groups), stride = groups * k;
  check_chosen(k, size, groups);
  Tensor values = allocate(x, {x.size(0), stride}, x.scalar_type());
  Tensor indices = allocate(x, {x.size(0), stride}, ScalarType::Long);
  with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t g = 0; g < groups; ++g) {
      auto its = [&](const std::optional<Tensor>& latents) { return part_of(latents, g * size, size); };
      Output<T> output{mutable_data<T>(values) + g * k, mutable_data<int64_t>(indices) + g * k, int32_t(stride),
                       int32_t(g * size), chosen == Activation::relu};
      Encoder<T>(x, *its(weight), its(bias), k, chosen, its(latent_scale), its(latent_mask), output).run();
    }
  });
  return {values, indices};
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, topk_encode)

}  // namespace fastsparse::cuda
