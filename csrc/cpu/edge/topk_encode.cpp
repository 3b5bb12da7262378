#include "cpu/topk_encode.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/edge/edge.h"
#include "cpu/edge/product.h"
#include "cpu/edge/screening.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kMaxRows = 2048;                  // tokens at a time: scratch stays O(kMaxRows)
constexpr int64_t kStripeBytes = int64_t{8} << 20;  // of scores, and of copied atoms: both stay in the shared cache
constexpr int64_t kListBytes = int64_t{64} << 20;   // of candidates; a larger k takes fewer tokens at a time
constexpr size_t kKeptBytes = size_t{64} << 20;     // of scratch, from call to call
constexpr int64_t kFewTokens = 8;
constexpr int64_t kPad = 64;                        // kernels read whole vectors

template <typename C> C* data(const Tensor& tensor) { return static_cast<C*>(tensor.mutable_data_ptr()); }

// Scratch of a call. It stays with the calling thread, up to kKeptBytes: fresh memory for every call would cost the
// system's clearing of it, a twentieth of a call's time.
struct Workspace {
  Scratch bias, scale, lists, counts, thresholds, scores, tokens, token_norms, atoms, atom_norms, rest;

  static Workspace& of_this_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
  size_t bytes() const {
    size_t total = 0;
    for (const Scratch* part : {&bias, &scale, &lists, &counts, &thresholds, &scores, &tokens, &token_norms, &atoms,
                                &atom_norms, &rest})
      total += part->bytes();
    return total;
  }
  // Gives memory back when a call has ended, also by an exception.
  struct Lease {
    Workspace& workspace = of_this_thread();
    ~Lease() {
      if (workspace.bytes() > kKeptBytes) workspace = Workspace();
    }
  };
};

// One call: the arguments as kernels want them, and the two ways to serve a block of tokens.
class Encoder {
 public:
  Encoder(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t k,
          Activation activation, const std::optional<Tensor>& latent_scale,
          const std::optional<Tensor>& latent_mask)
      : x_(with_unit_stride(x)), weight_(with_unit_stride(weight)), N_(x.size(0)), D_(x.size(1)), k_(k),
        dtype_(dtype_of(x)), accumulator_(accumulator_of(x.scalar_type())), activation_(activation) {
    if (latent_mask) list_eligible(*latent_mask);
    latents_ = latent_mask ? int64_t(eligible_.size()) : weight.size(0);
    if (k < 1 || k > latents_)
      throw std::invalid_argument("topk_encode: k must be between 1 and the number of eligible latents (" +
                                  std::to_string(latents_) + "), got k=" + std::to_string(k));
    if (latents_ >= std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("topk_encode: weight must have fewer than 2^31 rows, got " +
                                  std::to_string(latents_));
    bias_ = per_latent(bias, scratch_.bias);
    if (latent_scale) scale_ = per_latent(latent_scale, scratch_.scale);
    values_ = allocate({N_, k}, x.scalar_type());
    indices_ = allocate({N_, k}, ScalarType::Long);
  }

  std::tuple<Tensor, Tensor> run() {
    bool screened = screens(dtype_, N_, D_, latents_, k_);
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
  void list_eligible(const Tensor& mask) {
    Tensor flags = torch::stable::contiguous(mask);
    auto* flag = static_cast<const bool*>(flags.const_data_ptr());
    for (int64_t m = 0; m < flags.size(0); ++m)
      if (flag[m]) eligible_.push_back(m);
  }
  const int64_t* eligible() const { return eligible_.empty() ? nullptr : eligible_.data(); }

  bool fp64() const { return accumulator_ == ScalarType::Double; }
  int64_t accumulator_bytes() const { return fp64() ? 8 : 4; }

  // A vector over the eligible latents in the accumulation type; zeros for none.
  void* per_latent(const std::optional<Tensor>& vector, Scratch& scratch) {
    char* result = scratch.get<char>((latents_ + kPad) * accumulator_bytes());
    std::memset(result, 0, (latents_ + kPad) * accumulator_bytes());
    if (!vector) return result;
    Tensor wide = as_contiguous(*vector, accumulator_);
    auto copy = [&](auto* to, const void* source) {
      auto* from = static_cast<decltype(to)>(const_cast<void*>(source));
      for (int64_t m = 0; m < latents_; ++m) to[m] = from[eligible() ? eligible_[m] : m];
    };
    if (fp64()) copy(reinterpret_cast<double*>(result), wide.const_data_ptr());
    else copy(reinterpret_cast<float*>(result), wide.const_data_ptr());
    return result;
  }

  // How many latents to score at a time, in whole vectors: the scores, and the atoms where they are copied, share a
  // cache.
  int64_t stripe_latents(int64_t rows, int64_t element_bytes, bool copied) const {
    int64_t fitting = kStripeBytes / (element_bytes * std::max(rows, copied ? D_ : 1));
    return std::min(latents_, std::max<int64_t>(fitting, 256) / 16 * 16);
  }

  template <typename C> Candidates candidates(int64_t rows, int64_t capacity) {
    int32_t* counts = scratch_.counts.get<int32_t>(rows);
    std::fill(counts, counts + rows, 0);
    C* thresholds = scratch_.thresholds.get<C>(rows);
    std::fill(thresholds, thresholds + rows, -std::numeric_limits<C>::infinity());
    void* lists = scratch_.lists.get<char>(rows * list_bytes(capacity, sizeof(C)));
    return {k_, capacity, activation_ == Activation::abs, lists, counts, thresholds};
  }

  const void* row(const Tensor& tensor, int64_t n) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + n * tensor.stride(0) * int64_t(tensor.element_size());
  }

  void select(const Candidates& candidates, int64_t begin, int64_t rows, const int64_t* order) {
    SelectArgs args{candidates, eligible(), order, activation_,
                    data<char>(values_) + begin * k_ * int64_t(values_.element_size()),
                    data<int64_t>(indices_) + begin * k_, dtype_};
    parallel(rows, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_select)](int64_t b, int64_t e) { run(args, b, e); });
  }

  // Tokens [begin, begin + rows), or those listed in `order`, from exact scores.
  void plain(int64_t begin, int64_t total_rows, const int64_t* order) {
    int64_t capacity = std::min(latents_, std::max<int64_t>(2 * k_, k_ + 256));
    int64_t most = std::max<int64_t>(16, kListBytes / list_bytes(capacity, accumulator_bytes()));
    for (int64_t done = 0; done < total_rows; done += most) {
      int64_t rows = std::min(most, total_rows - done);
      plain_block(begin + (order ? 0 : done), rows, order ? order + done : nullptr, capacity);
    }
  }

  void plain_block(int64_t begin, int64_t rows, const int64_t* order, int64_t capacity) {
    bool copied = eligible() || weight_.scalar_type() != accumulator_;
    int64_t latents = stripe_latents(rows, accumulator_bytes(), copied);
    Candidates found = fp64() ? candidates<double>(rows, capacity) : candidates<float>(rows, capacity);
    // For few tokens widening the weight would cost more than the product.
    bool direct = weight_.element_size() == 2 && rows <= kFewTokens && !order;
    Tensor tokens = wide_rows(x_, begin, rows, order, scratch_.tokens);
    char* scratch = scratch_.scores.get<char>(rows * latents * accumulator_bytes());
    for (int64_t m = 0; m < latents_; m += latents) {
      int64_t count = std::min(latents, latents_ - m);
      const int64_t* wanted = eligible() ? eligible() + m : nullptr;
      Tensor out = over(scratch, rows, count, count, accumulator_);
      Tensor scores = direct    ? score(begin, rows, m, count, wanted, out)
                      : D_ == 0 ? torch::stable::zero_(out)
                                : product(tokens, wide_rows(weight_, m, count, wanted, scratch_.atoms), out);
      PlainArgs args{found, stripe(m, count, latents), scores.const_data_ptr(), fp64() ? DType::f64 : DType::f32};
      parallel(rows, 8, [&, run = FASTSPARSE_KERNEL(topk_encode_plain)](int64_t b, int64_t e) { run(args, b, e); });
    }
    select(found, begin, rows, order);
  }

  Tensor score(int64_t begin, int64_t rows, int64_t m, int64_t count, const int64_t* order, const Tensor& out) {
    ScoreArgs args{row(x_, begin), order ? weight_.const_data_ptr() : row(weight_, m), order, rows, D_, x_.stride(0),
                   weight_.stride(0), count, dtype_, data<float>(out)};
    parallel(count, 64, [&, run = FASTSPARSE_KERNEL(topk_encode_score)](int64_t b, int64_t e) { run(args, b, e); });
    return out;
  }

  // Rows of x or weight in the accumulation type: the tensor's own memory where that serves.
  Tensor wide_rows(const Tensor& tensor, int64_t begin, int64_t count, const int64_t* order, Scratch& scratch) {
    if (!order && tensor.scalar_type() == accumulator_)
      return count == tensor.size(0) ? tensor
                                     : over(row(tensor, begin), count, D_, tensor.stride(0), accumulator_);
    WidenArgs args{order ? tensor.const_data_ptr() : row(tensor, begin), order, tensor.stride(0), D_, dtype_,
                   scratch.get<char>(count * D_ * accumulator_bytes())};
    parallel(count, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_widen)](int64_t b, int64_t e) { run(args, b, e); });
    return over(args.widened, count, D_, D_, accumulator_);
  }

  Stripe stripe(int64_t begin, int64_t count, int64_t latents) const {
    // The k-th best of twice as many latents is a bound worth the work of finding it.
    int64_t position = begin / std::max<int64_t>(1, latents);
    bool doubled = (position & (position - 1)) == 0;
    int64_t offset = begin * accumulator_bytes();
    Stripe stripe{.begin = begin, .count = count, .doubled = doubled};
    stripe.bias = static_cast<char*>(bias_) + offset;
    if (scale_) stripe.scale = static_cast<char*>(scale_) + offset;
    return stripe;
  }

  // bf16 copies of rows, and their norms.
  struct Rounded {
    bf16* rows;
    float *norm, *residual;
  };
  Rounded round(const Tensor& tensor, int64_t begin, int64_t count, const int64_t* order, Scratch& rows,
                Scratch& norms) {
    float* norm = norms.get<float>(2 * (count + kPad));
    Rounded to{rows.get<bf16>(count * D_), norm, norm + count + kPad};
    RoundArgs args{order ? tensor.const_data_ptr() : row(tensor, begin), order, tensor.stride(0), D_, dtype_,
                   to.rows, to.norm, to.residual};
    parallel(count, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_round)](int64_t b, int64_t e) { run(args, b, e); });
    return to;
  }

  // Tokens [begin, begin + rows) by screen, certify and refine; returns those that the screen can't decide.
  std::vector<int64_t> screen(int64_t begin, int64_t total_rows) {
    int64_t capacity = std::min(latents_, std::max<int64_t>(8 * k_, 128));
    int64_t most = std::max<int64_t>(16, kListBytes / list_bytes(capacity, sizeof(float)));
    std::vector<int64_t> hopeless;
    for (int64_t done = 0; done < total_rows; done += most)
      screen_block(begin + done, std::min(most, total_rows - done), capacity, hopeless);
    return hopeless;
  }

  void screen_block(int64_t begin, int64_t rows, int64_t capacity, std::vector<int64_t>& hopeless) {
    int64_t latents = stripe_latents(rows, 2, true);
    Candidates found = candidates<float>(rows, capacity);
    Rounded tokens = round(x_, begin, rows, nullptr, scratch_.tokens, scratch_.token_norms);
    Tensor token_rows = over(tokens.rows, rows, D_, D_, ScalarType::BFloat16);
    bf16* scratch = scratch_.scores.get<bf16>(rows * latents);
    float* rest = scratch_.rest.get<float>(latents + kPad);
    for (int64_t m = 0; m < latents_; m += latents) {
      int64_t count = std::min(latents, latents_ - m);
      Rounded atoms = round(weight_, m, count, eligible() ? eligible() + m : nullptr, scratch_.atoms, scratch_.atom_norms);
      Tensor scores = product(token_rows, over(atoms.rows, count, D_, D_, ScalarType::BFloat16),
                              over(scratch, rows, count, count, ScalarType::BFloat16));
      ScreenArgs args{found, bracketed(stripe(m, count, latents), atoms.norm, atoms.residual, rest, D_),
                      data<bf16>(scores), tokens.norm, tokens.residual, D_};
      parallel(rows, 8, [&, run = FASTSPARSE_KERNEL(topk_encode_screen)](int64_t b, int64_t e) { run(args, b, e); });
    }
    parallel(rows, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_certify)](int64_t b, int64_t e) { run(found, b, e); });
    refine(found, begin, rows);
    select(found, begin, rows, nullptr);
    for (int64_t n = 0; n < rows; ++n)
      if (found.count[n] == kHopeless) hopeless.push_back(begin + n);
  }

  void refine(const Candidates& found, int64_t begin, int64_t rows) {
    RefineArgs args{found, rows, D_, row(x_, begin), weight_.const_data_ptr(), x_.stride(0), weight_.stride(0),
                    eligible(), static_cast<const float*>(bias_), static_cast<const float*>(scale_), dtype_};
    // Each task reads all candidates to find its own, so few tasks; more than threads, for balance.
    int64_t tasks = 4 * int64_t(torch::stable::get_num_threads());
    parallel(latents_, (latents_ + tasks - 1) / tasks,
             [&, run = FASTSPARSE_KERNEL(topk_encode_refine)](int64_t b, int64_t e) { run(args, b, e); });
  }

  Tensor x_, weight_, values_, indices_;
  std::vector<int64_t> eligible_;  // empty: all latents are
  int64_t N_, D_, k_, latents_ = 0;
  DType dtype_;
  ScalarType accumulator_;
  Activation activation_;
  void *bias_ = nullptr, *scale_ = nullptr;  // per eligible latent, of the accumulation type
  Workspace::Lease lease_;
  Workspace& scratch_ = lease_.workspace;
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
