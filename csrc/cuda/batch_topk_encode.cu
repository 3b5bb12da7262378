#include "cuda/batch_topk_encode.cuh"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

#include "options.h"
#include "cuda/latents.h"
#include "cuda/sort.h"

namespace fastsparse::cuda {

namespace {

constexpr int64_t kLeast = int64_t{1} << 16;  // more than `total` that even a small pool has room for

// One call for tensors of one type.
template <typename T> class BatchEncoder {
  using C = Accumulator<T>;

 public:
  BatchEncoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t total,
               Activation activation, const std::optional<Tensor>& scale, const std::optional<Tensor>& mask)
      : call_(x), x_(x), weight_(weight), N_(x.size(0)), M_(weight.size(0)), total_(checked(total)),
        relu_(activation == Activation::relu), terms_(call_, weight, bias, scale, mask, activation == Activation::abs) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> run() {
    plan();
    for (int64_t n = 0; n < N_; n += rows_) {
      int64_t rows = std::min(rows_, N_ - n);
      Tensor tokens = rows_of(x_, n, rows);
      for (int64_t m = 0; m < M_; m += stripe_) {
        int64_t count = std::min(stripe_, M_ - m);
        product(tokens, rows_of(weight_, m, count), scores_of(*scores_, rows, count, stripe_));
        take({{data<C>(*scores_), stripe_, int(m), int(count)}, terms_.latents, n, N_, M_, int(rows), int(splits_)},
             pool_.capacity);
      }
    }
    take({{nullptr, 0, 0, 0}, terms_.latents, 0, N_, M_, 0, 1}, total_);
    return result();
  }

 private:
  Tensor scratch(int64_t count, ScalarType dtype) const { return allocate(x_, {count}, dtype); }
  static constexpr ScalarType accumulator() { return sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float; }
  static constexpr ScalarType order_type() { return sizeof(C) == 8 ? ScalarType::Long : ScalarType::Int; }
  int64_t blocks(int64_t threads) const { return ceil_div(threads, kPoolThreads); }

  int64_t checked(int64_t total) const {
    if (M_ >= std::numeric_limits<int32_t>::max() - 4096)
      throw std::invalid_argument("batch_topk_encode: weight must have fewer than 2^31 - 4096 rows, got " +
                                  std::to_string(M_));
    if (total < 1 || total > N_ * M_)
      throw std::invalid_argument("batch_topk_encode: total must be between 1 and the number of latents (" +
                                  std::to_string(M_) + ") times that of tokens (" + std::to_string(N_) +
                                  "), got total=" + std::to_string(total));
    return total;
  }

  // Rows and latents to take at a time, the pool, and scratch for them.
  void plan() {
    rows_ = block_rows(N_, kMostRows);
    stripe_ = stripe_latents<C>(call_, rows_, M_, kGroup<C>);
    splits_ = stripe_splits(call_, rows_, stripe_);
    scores_ = scratch(rows_ * stripe_, accumulator());
    int64_t all = N_ * M_, capacity = total_ > all / 2 ? all : std::min(all, 2 * total_ + kLeast);
    if (knobs.bytes) capacity = total_;
    order_ = scratch(2 * capacity, order_type());
    earliness_ = scratch(2 * capacity, ScalarType::Long);
    score_ = scratch(2 * capacity, accumulator());
    pool_ = {total_, capacity, mutable_data<Order<C>>(*order_), mutable_data<uint64_t>(*earliness_),
             mutable_data<C>(*score_)};
    Digits<C> digits{int(std::bit_width(uint64_t(all - 1)))};
    int64_t steps = ceil_div(N_, rows_) * ceil_div(M_, stripe_) + 2;
    steps_ = scratch(steps * int64_t(sizeof(Step<C>)), ScalarType::Byte);
    choices_ = scratch((digits.count() + 1) * int64_t(sizeof(Choice<C>)), ScalarType::Byte);
    counts_ = scratch(digits.count() * kDigitValues, ScalarType::Long);
    least_ = scratch(1, order_type());
    step_ = mutable_data<Step<C>>(*steps_);
    search_ = {digits, mutable_data<Choice<C>>(*choices_), mutable_data<unsigned long long>(*counts_)};
    call_.launch("batch_topk_encode_begin", batch_topk_encode_begin<C>, blocks(kDigitValues), kPoolThreads, 0, step_,
                 search_, mutable_data<Order<C>>(*least_));
  }

  // Takes a stripe's scores into the pool, of which no more than `limit` stay.
  void take(const Scores<C>& scores, int64_t limit) {
    bool keyed = terms_.keyed;
    int64_t warps = int64_t(scores.rows) * scores.splits;
    call_.launch("batch_topk_encode_append", keyed ? batch_topk_encode_append<C, true> : batch_topk_encode_append<C, false>,
                 ceil_div(warps, kFilterThreads / kWarp), kFilterThreads, 0, pool_, scores, step_);
    int64_t most = std::max(ceil_div(warps, kPoolThreads / kWarp),
                            std::min<int64_t>(blocks(pool_.capacity), 4 * call_.multiprocessors()));
    int64_t grid = std::max(most, blocks(kDigitValues));
    for (int digit = 0; digit < search_.digits.count(); ++digit)
      call_.launch("batch_topk_encode_count", keyed ? batch_topk_encode_count<C, true> : batch_topk_encode_count<C, false>,
                   grid, kPoolThreads, 0, pool_, scores, step_, limit, search_, digit);
    call_.launch("batch_topk_encode_keep", keyed ? batch_topk_encode_keep<C, true> : batch_topk_encode_keep<C, false>,
                 grid, kPoolThreads, 0, pool_, scores, step_, limit, search_);
    ++step_;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() {
    Pairs pairs{scratch(total_, ScalarType::Long), scratch(total_, ScalarType::Long)};
    auto* least = mutable_data<Order<C>>(*least_);
    call_.launch("batch_topk_encode_pairs", batch_topk_encode_pairs<C>, blocks(total_), kPoolThreads, 0, pool_, step_,
                 N_ * M_, mutable_data<uint64_t>(pairs.keys), mutable_data<uint64_t>(pairs.values), least);
    for (auto* memory : {&scores_, &order_, &earliness_, &score_}) memory->reset();
    pairs = sort_pairs(call_, pairs, search_.digits.place_bits);
    Tensor values = scratch(total_, x_.scalar_type()), indices = scratch(total_, ScalarType::Long);
    Tensor offsets = scratch(N_ + 1, ScalarType::Long), threshold = allocate(x_, {}, accumulator());
    BatchCode<T> code{mutable_data<T>(values), mutable_data<int64_t>(indices), mutable_data<int64_t>(offsets),
                      mutable_data<C>(threshold)};
    call_.launch("batch_topk_encode_write", batch_topk_encode_write<T>, blocks(std::max(total_, N_ + 1)), kPoolThreads,
                 0, data<uint64_t>(pairs.keys), data<uint64_t>(pairs.values), least, total_, N_, M_, relu_, code);
    return {values, indices, offsets, threshold};
  }

  Call call_;
  Tensor x_, weight_;
  int64_t N_, M_, total_, rows_ = 0, stripe_ = 0, splits_ = 1;
  bool relu_;
  LatentMemory<T> terms_;
  Pool<C> pool_{};
  Search<C> search_{};
  Step<C>* step_ = nullptr;
  std::optional<Tensor> scores_, order_, earliness_, score_, steps_, choices_, counts_, least_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk_encode(const Tensor& x, const Tensor& weight,
                                                             const std::optional<Tensor>& bias, int64_t total,
                                                             int64_t activation,
                                                             const std::optional<Tensor>& latent_scale,
                                                             const std::optional<Tensor>& latent_mask) {
  auto chosen = option_of<Activation>("batch_topk_encode", "activation", activation, kActivations);
  return with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    return BatchEncoder<T>(x, weight, bias, total, chosen, latent_scale, latent_mask).run();
  });
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, batch_topk_encode)

}  // namespace fastsparse::cuda
