#include "cpu/batch_topk_encode.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/edge/scorer.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kLeast = int64_t{1} << 16;  // more than `total` that even a small pool has room for
constexpr int64_t kListed = 64;               // scores of a row on their way to the pool

// One call: all of the batch into one pool.
class BatchEncoder {
 public:
  BatchEncoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t total,
               Activation activation, const std::optional<Tensor>& latent_scale,
               const std::optional<Tensor>& latent_mask)
      : x_(with_unit_stride(x)), activation_(activation), scorer_(weight, latent_mask, 0), latents_(scorer_.latents()),
        N_(x.size(0)), total_(checked(total)), row_bytes_(x_.stride(0) * int64_t(x_.element_size())),
        number_(accumulator_of(x.scalar_type())), number_bytes_(number_ == ScalarType::Double ? 8 : 4),
        rows_{x_.const_data_ptr(), nullptr, x_.stride(0), x_.size(1), dtype_of(x_)} {
    scorer_.add_terms(bias, latent_scale);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> run() {
    std::optional<std::vector<int64_t>> left;  // rows that no screen has decided; nothing for all
    if (screens(rows_.dtype, N_, rows_.D, latents_, (total_ + N_ - 1) / N_)) left = screen();
    if (!left) {
      begin(2, false);
      for (int64_t n = 0; n < N_; n += kMaxRows) plain(n, std::min(kMaxRows, N_ - n), nullptr);
    } else {
      int64_t count = int64_t(left->size());
      for (int64_t i = 0; i < count; i += kMaxRows) plain(0, std::min(kMaxRows, count - i), left->data() + i);
    }
    return result();
  }

 private:
  int64_t checked(int64_t total) const {
    if (total < 1 || total > N_ * latents_)
      throw std::invalid_argument("batch_topk_encode: total must be between 1 and the number of eligible latents (" +
                                  std::to_string(latents_) + ") times that of tokens (" + std::to_string(N_) +
                                  "), got total=" + std::to_string(total));
    for (auto [name, size] : {std::pair("x", N_), std::pair("weight", latents_)})
      if (size >= std::numeric_limits<int32_t>::max())
        throw std::invalid_argument(std::string("batch_topk_encode: ") + name +
                                    " must have fewer than 2^31 rows, got " + std::to_string(size));
    return total;
  }

  // An empty pool for so many times `total`.
  void begin(int64_t times, bool bracketed) {
    int64_t all = N_ * latents_, most = total_ > all / times ? all : times * total_;
    int64_t capacity = std::min(all, std::max(most, total_ + kLeast));
    pool_.total = total_;
    pool_.capacity = capacity;
    pool_.dtype = number_bytes_ == 8 ? DType::f64 : DType::f32;
    pool_.entries = entries_.get<char>(capacity * pool_entry_bytes(number_bytes_));
    pool_.bracketed = bracketed;
    pool_.lower = bracketed ? lower_.get<float>(capacity + kSlack) : nullptr;
    pool_.count = 0;
    pool_.bounded = pool_.hopeless = false;
  }

  Rows tokens(int64_t begin, const int64_t* order) const {
    Rows rows = rows_;
    rows.data = static_cast<const char*>(rows.data) + begin * row_bytes_;
    rows.order = order;
    return rows;
  }

  // Lets a kernel take all scores of some tokens.
  template <typename Take> Candidates take(int64_t begin, int64_t rows, const int64_t* order, const Take& kernel) {
    pool_.first_row = begin;
    pool_.order = order;
    Candidates lists = scorer_.candidates(rows, total_, kListed, activation_ == Activation::abs, pool_.bracketed);
    if (pool_.bracketed) scorer_.screen(tokens(begin, order), rows);
    else scorer_.plain(tokens(begin, order), rows, rows == N_ && !order ? &x_ : nullptr);
    for (Stripe stripe; !pool_.hopeless && scorer_.next(stripe);) {
      if (stripe.doubled) FASTSPARSE_KERNEL(batch_topk_encode_compact)(&pool_);
      parallel(rows, 8, kernel, &pool_, lists, stripe);
    }
    return lists;
  }

  // Some tokens by exact scores.
  void plain(int64_t begin, int64_t rows, const int64_t* order) {
    take(begin, rows, order, FASTSPARSE_KERNEL(batch_topk_encode_filter));
  }

  // All tokens by screen and refine but those returned; nothing where it can't decide.
  std::optional<std::vector<int64_t>> screen() {
    begin(8, true);
    std::vector<int64_t> left;
    for (int64_t first = 0; first < N_; first += kMaxRows) {
      int64_t rows = std::min(kMaxRows, N_ - first);
      Candidates lists = take(first, rows, nullptr, FASTSPARSE_KERNEL(batch_topk_encode_screen));
      if (pool_.hopeless) return std::nullopt;
      for (int64_t n = 0; n < rows; ++n)
        if (lists.count[n] == kHopeless) left.push_back(first + n);
    }
    FASTSPARSE_KERNEL(batch_topk_encode_compact)(&pool_);
    RefineArgs args{N_, rows_, scorer_.weight(), static_cast<const float*>(scorer_.bias()),
                    static_cast<const float*>(scorer_.scale())};
    int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());  // each reads the pool to find its own
    parallel(latents_, (latents_ + tasks - 1) / tasks, [&](int64_t latent_begin, int64_t latent_end) {
      FASTSPARSE_KERNEL(batch_topk_encode_refine)
      (&pool_, args, activation_ == Activation::abs, latent_begin, latent_end);
    });
    pool_.bracketed = pool_.bounded = false;
    return left;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() {
    Tensor values = allocate({total_}, x_.scalar_type()), indices = allocate({total_}, ScalarType::Long);
    Tensor offsets = allocate({N_ + 1}, ScalarType::Long), threshold = allocate({}, number_);
    Scratch sorted;
    ArrangeArgs args{N_, scorer_.eligible(), activation_, values.mutable_data_ptr(),
                     indices.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>(),
                     threshold.mutable_data_ptr(), rows_.dtype,
                     sorted.get<char>(total_ * pool_entry_bytes(number_bytes_))};
    FASTSPARSE_KERNEL(batch_topk_encode_arrange)(&pool_, args);
    parallel(N_, 16, FASTSPARSE_KERNEL(batch_topk_encode_write), args);
    return {values, indices, offsets, threshold};
  }

  Tensor x_;
  Activation activation_;
  Scorer scorer_;
  int64_t latents_, N_, total_, row_bytes_;
  ScalarType number_;
  int64_t number_bytes_;
  Rows rows_;
  Scratch entries_, lower_;
  Pool pool_{};
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_topk_encode(const Tensor& x, const Tensor& weight,
                                                             const std::optional<Tensor>& bias, int64_t total,
                                                             int64_t activation,
                                                             const std::optional<Tensor>& latent_scale,
                                                             const std::optional<Tensor>& latent_mask) {
  InFloatMode mode(Subnormals::kept);
  auto chosen = option_of<Activation>("batch_topk_encode", "activation", activation, kActivations);
  return BatchEncoder(x, weight, bias, total, chosen, latent_scale, latent_mask).run();
}

FASTSPARSE_REGISTER(fastsparse, CPU, batch_topk_encode)

}  // namespace fastsparse::edge
