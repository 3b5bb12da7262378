#include "topk_encode.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/edge/scorer.h"
#include "cpu/topk_encode.h"

namespace fastsparse::edge {

namespace {

// Where what is chosen of one group comes out.
struct Output {
  char* values;
  int64_t* indices;
  int64_t stride, first;
};

// One group of a call, and the two ways to serve a block of tokens.
class Encoder {
 public:
  Encoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t k, Activation activation,
          const std::optional<Tensor>& latent_scale, const std::optional<Tensor>& latent_mask, const Output& output)
      : x_(x), activation_(activation), scorer_(weight, latent_mask, 0), latents_(scorer_.latents()), N_(x.size(0)),
        k_(k), row_bytes_(x.stride(0) * int64_t(x.element_size())),
        rows_{x.const_data_ptr(), nullptr, x.stride(0), x.size(1), dtype_of(x)}, output_(output) {
    if (latents_ >= std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("topk_encode: weight must have fewer than 2^31 rows, got " +
                                  std::to_string(latents_));
    scorer_.add_terms(bias, latent_scale);
  }

  void run() {
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
  }

 private:
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
      for (Stripe stripe; scorer_.next(stripe);)
        parallel(rows, grain(stripe), FASTSPARSE_KERNEL(topk_encode_filter), found, stripe);
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
      for (Stripe stripe; scorer_.next(stripe);) parallel(rows, grain(stripe), FASTSPARSE_KERNEL(screen), found, stripe);
      parallel(rows, 16, FASTSPARSE_KERNEL(screen_certify), found);
      refine(found, first, rows);
      select(found, first, rows, nullptr);
      for (int64_t n = 0; n < rows; ++n)
        if (found.count[n] == kHopeless) hopeless.push_back(first + n);
    }
    return hopeless;
  }

  // How many rows of scores make a task: few, lest few tokens keep one thread.
  static int64_t grain(const Stripe& stripe) { return std::min<int64_t>(8, rows_a_task(4 * stripe.count)); }

  void refine(const Candidates& found, int64_t begin, int64_t rows) {
    RefineArgs args{rows, tokens(begin, nullptr), scorer_.weight(), static_cast<const float*>(scorer_.bias()),
                    static_cast<const float*>(scorer_.scale())};
    // Each task reads all candidates to find its own, so few tasks; more than threads, for balance.
    int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());
    parallel(latents_, (latents_ + tasks - 1) / tasks, FASTSPARSE_KERNEL(topk_encode_refine), found, args);
  }

  void select(const Candidates& found, int64_t begin, int64_t rows, const int64_t* order) {
    int64_t skipped = begin * output_.stride;
    SelectArgs args{scorer_.eligible(), order, activation_,
                    output_.values + skipped * int64_t(x_.element_size()), output_.indices + skipped, output_.stride,
                    output_.first, rows_.dtype};
    parallel(rows, 16, FASTSPARSE_KERNEL(topk_encode_select), found, args);
  }

  const Tensor& x_;
  Activation activation_;
  Scorer scorer_;
  int64_t latents_, N_, k_, row_bytes_;
  Rows rows_;
  Output output_;
};

// Of the group that has fewest.
int64_t eligible_latents(const std::optional<Tensor>& mask, int64_t size, int64_t groups) {
  if (!mask) return size;
  Tensor flags = as_contiguous(*mask, ScalarType::Bool);
  auto* flag = static_cast<const bool*>(flags.const_data_ptr());
  int64_t fewest = size;
  for (int64_t g = 0; g < groups; ++g)
    fewest = std::min<int64_t>(fewest, std::count(flag + g * size, flag + (g + 1) * size, true));
  return fewest;
}

}  // namespace

std::tuple<Tensor, Tensor> topk_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       int64_t k, int64_t activation,
                                       const std::optional<Tensor>& latent_scale,
                                       const std::optional<Tensor>& latent_mask, int64_t groups) {
  InFloatMode mode(Subnormals::kept);
  auto chosen = option_of<Activation>("topk_encode", "activation", activation, kActivations);
  int64_t size = group_size(weight.size(0), groups), N = x.size(0), stride = groups * k;
  check_chosen(k, eligible_latents(latent_mask, size, groups), groups);
  Tensor tokens = with_unit_stride(x), values = allocate({N, stride}, x.scalar_type());
  Tensor indices = allocate({N, stride}, ScalarType::Long);
  for (int64_t g = 0; g < groups; ++g) {
    auto its = [&](const std::optional<Tensor>& latents) { return part_of(latents, g * size, size); };
    Output output{static_cast<char*>(values.mutable_data_ptr()) + g * k * int64_t(x.element_size()),
                  indices.mutable_data_ptr<int64_t>() + g * k, stride, g * size};
    Encoder(tokens, *its(weight), its(bias), k, chosen, its(latent_scale), its(latent_mask), output).run();
  }
  return {values, indices};
}

FASTSPARSE_REGISTER(fastsparse, CPU, topk_encode)

}  // namespace fastsparse::edge
