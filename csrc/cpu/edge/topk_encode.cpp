#include "cpu/topk_encode.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/edge/scorer.h"

namespace fastsparse::edge {

namespace {

// One call, and the two ways to serve a block of tokens.
class Encoder {
 public:
  Encoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t k,
          Activation activation, const std::optional<Tensor>& latent_scale,
          const std::optional<Tensor>& latent_mask)
      : x_(with_unit_stride(x)), activation_(activation), scorer_(weight, latent_mask, 0), latents_(scorer_.latents()),
        N_(x.size(0)), k_(checked(k)), row_bytes_(x_.stride(0) * int64_t(x_.element_size())),
        rows_{x_.const_data_ptr(), nullptr, x_.stride(0), x_.size(1), dtype_of(x_)},
        values_(allocate({N_, k}, x.scalar_type())), indices_(allocate({N_, k}, ScalarType::Long)) {
    scorer_.add_terms(bias, latent_scale);
  }

  std::tuple<Tensor, Tensor> run() {
    bool screened = screens(rows_.dtype, N_, rows_.D, latents_, k_);
    int64_t rows = std::min(N_, kMaxRows);
    for (int64_t n = 0; n < N_; n += rows) {
      int64_t count = std::min(rows, N_ - n);
      if (!screened) {
        plain(n, count, nullptr);
        continue;
      }
      std::vector<int64_t> hopeless = screen(n, count);
      if (!hopeless.empty()) plain(0, int64_t(hopeless.size()), hopeless.data());
    }
    return {values_, indices_};
  }

 private:
  int64_t checked(int64_t k) const {
    if (k < 1 || k > latents_)
      throw std::invalid_argument("topk_encode: k must be between 1 and the number of eligible latents (" +
                                  std::to_string(latents_) + "), got k=" + std::to_string(k));
    if (latents_ >= std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("topk_encode: weight must have fewer than 2^31 rows, got " +
                                  std::to_string(latents_));
    return k;
  }

  // Tokens from one on, or those listed in `order`.
  Rows tokens(int64_t begin, const int64_t* order) const {
    Rows rows = rows_;
    rows.data = static_cast<const char*>(rows.data) + begin * row_bytes_;
    rows.order = order;
    return rows;
  }

  // Tokens [begin, begin + total), or those listed in `order`, from exact scores.
  void plain(int64_t begin, int64_t total, const int64_t* order) {
    int64_t capacity = std::min(latents_, std::max<int64_t>(2 * k_, k_ + 256));
    int64_t most = scorer_.most_rows(capacity, false);
    for (int64_t done = 0; done < total; done += most) {
      int64_t rows = std::min(most, total - done), first = order ? 0 : begin + done;
      const int64_t* listed = order ? order + done : nullptr;
      Candidates found = scorer_.candidates(rows, k_, capacity, activation_ == Activation::abs, false);
      scorer_.plain(tokens(first, listed), rows, rows == N_ && !listed ? &x_ : nullptr);
      for (Stripe stripe; scorer_.next(stripe);) parallel(rows, 8, FASTSPARSE_KERNEL(topk_encode_filter), found, stripe);
      select(found, first, rows, listed);
    }
  }

  // Tokens [begin, begin + total) by screen, certify and refine; returns those that the screen can't decide.
  std::vector<int64_t> screen(int64_t begin, int64_t total) {
    int64_t capacity = std::min(latents_, std::max<int64_t>(8 * k_, 128)), most = scorer_.most_rows(capacity, true);
    std::vector<int64_t> hopeless;
    for (int64_t first = begin, end = begin + total; first < end; first += most) {
      int64_t rows = std::min(most, end - first);
      Candidates found = scorer_.candidates(rows, k_, capacity, activation_ == Activation::abs, true);
      scorer_.screen(tokens(first, nullptr), rows);
      for (Stripe stripe; scorer_.next(stripe);) parallel(rows, 8, FASTSPARSE_KERNEL(screen), found, stripe);
      parallel(rows, 16, FASTSPARSE_KERNEL(screen_certify), found);
      refine(found, first, rows);
      select(found, first, rows, nullptr);
      for (int64_t n = 0; n < rows; ++n)
        if (found.count[n] == kHopeless) hopeless.push_back(first + n);
    }
    return hopeless;
  }

  void refine(const Candidates& found, int64_t begin, int64_t rows) {
    RefineArgs args{rows, tokens(begin, nullptr), scorer_.weight(), static_cast<const float*>(scorer_.bias()),
                    static_cast<const float*>(scorer_.scale())};
    // Each task reads all candidates to find its own, so few tasks; more than threads, for balance.
    int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());
    parallel(latents_, (latents_ + tasks - 1) / tasks, FASTSPARSE_KERNEL(topk_encode_refine), found, args);
  }

  void select(const Candidates& found, int64_t begin, int64_t rows, const int64_t* order) {
    SelectArgs args{scorer_.eligible(), order, activation_,
                    static_cast<char*>(values_.mutable_data_ptr()) + begin * k_ * int64_t(values_.element_size()),
                    indices_.mutable_data_ptr<int64_t>() + begin * k_, rows_.dtype};
    parallel(rows, 16, FASTSPARSE_KERNEL(topk_encode_select), found, args);
  }

  Tensor x_;
  Activation activation_;
  Scorer scorer_;
  int64_t latents_, N_, k_, row_bytes_;
  Rows rows_;
  Tensor values_, indices_;
};

}  // namespace

std::tuple<Tensor, Tensor> topk_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       int64_t k, int64_t activation,
                                       const std::optional<Tensor>& latent_scale,
                                       const std::optional<Tensor>& latent_mask) {
  InFloatMode mode(Subnormals::kept);
  auto chosen = option_of<Activation>("topk_encode", "activation", activation, kActivations);
  return Encoder(x, weight, bias, k, chosen, latent_scale, latent_mask).run();
}

FASTSPARSE_REGISTER(fastsparse, CPU, topk_encode)

}  // namespace fastsparse::edge
