#include "cpu/edge/scorer.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "cpu/bf16_panels.h"
#include "cpu/edge/knobs.h"
#include "cpu/edge/product.h"
#include "cpu/integers.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kStripeBytes = int64_t{8} << 20;  // of scores, and of copied latents: both stay in the shared cache
constexpr int64_t kListBytes = int64_t{64} << 20;   // of candidates
constexpr size_t kKeptBytes = size_t{64} << 20;     // of scratch, from call to call
// Up to so many rows our own products, of fp32 and of narrower types, are faster than the library's, which take a copy of the
// weight; and wherever there is little to multiply.
constexpr int64_t kFewRows = 8, kFewNarrowRows = 48, kTinyProduct = int64_t{1} << 18;
constexpr int64_t kTaskProducts = int64_t{1} << 17;  // multiplications that are worth handing to a thread
constexpr int64_t kLatentGroup = strassen::kSide * kLatentPanel;
constexpr int64_t kPad = 64;                        // kernels read whole vectors

bool fused_integers() {
  return knobs.fused && (current_isa() == Isa::avx512 ? cpu_features().vnni : current_isa() == Isa::avx2 && cpu_features().avx_vnni);
}

// Strassen's combinations of the latents, which should stay in a cache, must be a small part of the work, and so must
// adding up its products.
bool by_strassen(int64_t rows, int64_t D) {
  if (knobs.strassen >= 0) return knobs.strassen;
  return rows >= 192 && D >= 256 && D <= 8192 && rows * D >= int64_t{1} << 18;
}

}  // namespace

Screen screen_here() {
  bool fast = cpu_features().fast_bf16 && (kBf16Panels || current_isa() == Isa::avx512);
  if (knobs.screening < 1 ? !fast : knobs.screening == 2) return Screen::integers;
  return fast && kBf16Panels ? Screen::bf16_panels : Screen::bf16;
}

// Enough tokens must share the rounding of the weight, which bf16 needs none of where the library multiplies, to be faster
// than what plain() does; a large k leaves little to drop.
bool screens(DType dtype, int64_t N, int64_t D, int64_t latents, int64_t k) {
  bool possible = dtype != DType::f64 && D > 0 && N > 0;
  if (knobs.screening >= 0 || !possible) return possible && knobs.screening > 0;
  if (latents < 1024 || k > latents / 16) return false;
  Screen screen = screen_here();
  if (screen == Screen::integers) {
    // The library's fp32 products are of no level, and an Arm processor's integers no faster than its fp32.
    if (current_isa() == Isa::baseline) return false;
    return D >= 256 ? N > (dtype == DType::f32 ? kFewRows : kFewNarrowRows) : D >= 128 && N >= 64;
  }
  return D >= 64 && N >= (screen == Screen::bf16 && dtype == DType::bf16 ? kFewRows : 40);
}

// It stays with the calling thread: fresh memory for every call would cost the system's clearing of it, a twentieth of a
// call's time. Where copies are kept it doesn't: calls are longer, and a second set of memory would crowd the cache.
Scorer::Workspace& Scorer::Workspace::of_this_thread() {
  static thread_local Workspace workspace;
  return workspace;
}

Scorer::Scorer(const Tensor& weight, const std::optional<Tensor>& mask, int64_t kept_bytes)
    : weight_(with_unit_stride(weight)), D_(weight.size(1)), latents_(weight.size(0)), kept_bytes_(kept_bytes),
      dtype_(dtype_of(weight)), accumulator_(accumulator_of(weight.scalar_type())), screen_(screen_here()) {
  if (!mask) return;
  Tensor flags = torch::stable::contiguous(*mask);
  auto* flag = static_cast<const bool*>(flags.const_data_ptr());
  for (int64_t m = 0; m < latents_; ++m)
    if (flag[m]) eligible_.push_back(m);
  latents_ = int64_t(eligible_.size());
}

Scorer::~Scorer() {
  size_t total = 0;
  for (const Scratch* part : {&scratch_.bias, &scratch_.scale, &scratch_.lists, &scratch_.counts, &scratch_.thresholds,
                              &scratch_.scores, &scratch_.tokens, &scratch_.token_norms, &scratch_.combined,
                              &scratch_.wide, &scratch_.rounded, &scratch_.norms})
    total += part->bytes();
  if (total > kKeptBytes) scratch_ = Workspace();
}

Rows Scorer::weight(int64_t begin) const {
  auto* data = static_cast<const char*>(weight_.const_data_ptr());
  int64_t row_bytes = weight_.stride(0) * int64_t(weight_.element_size());
  return {data + (eligible() ? 0 : begin * row_bytes), eligible() ? eligible() + begin : nullptr, weight_.stride(0), D_,
          dtype_};
}

void* Scorer::zeros(Scratch& scratch) const {
  int64_t bytes = (latents_ + kPad) * number_bytes(false);
  char* result = scratch.get<char>(bytes);
  std::fill(result, result + bytes, 0);
  return result;
}

void* Scorer::per_latent(const Tensor& vector, Scratch& scratch) const {
  void* result = zeros(scratch);
  Tensor numbers = as_contiguous(vector, accumulator_);
  auto copy = [&](auto* to) {
    auto* from = static_cast<decltype(to)>(numbers.mutable_data_ptr());
    for (int64_t m = 0; m < latents_; ++m) to[m] = from[eligible() ? eligible_[m] : m];
  };
  if (fp64()) copy(static_cast<double*>(result));
  else copy(static_cast<float*>(result));
  return result;
}

void Scorer::add_terms(const std::optional<Tensor>& bias, const std::optional<Tensor>& scale) {
  bias_ = bias ? per_latent(*bias, scratch_.bias) : zeros(scratch_.bias);
  if (scale) scale_ = per_latent(*scale, scratch_.scale);
}

Candidates Scorer::candidates(int64_t rows, int64_t k, int64_t capacity, bool absolute, bool screened) {
  int64_t bytes = number_bytes(screened);
  int32_t* counts = scratch_.counts.get<int32_t>(rows);
  std::fill(counts, counts + rows, 0);
  void* thresholds = scratch_.thresholds.get<char>(rows * bytes);
  auto open = [&](auto* threshold) {
    std::fill(threshold, threshold + rows, -std::numeric_limits<std::decay_t<decltype(*threshold)>>::infinity());
  };
  if (bytes == 8) open(static_cast<double*>(thresholds));
  else open(static_cast<float*>(thresholds));
  return {k, capacity, absolute, bytes == 8 ? DType::f64 : DType::f32,
          scratch_.lists.get<char>(rows * list_bytes(capacity, bytes)), counts, thresholds};
}

int64_t Scorer::most_rows(int64_t capacity, bool screened) const {
  return std::max<int64_t>(16, kListBytes / list_bytes(capacity, number_bytes(screened)));
}

// How many latents to score at a time, in whole vectors and groups of panels: the scores, and the latents where they are
// copied, share a cache.
void Scorer::begin(const Rows& x, int64_t count, bool screened, bool copied) {
  int64_t bytes = screened ? 2 : number_bytes(false);
  int64_t fitting = kStripeBytes / (bytes * std::max(count, copied ? D_ : 1));
  width_ = std::min(latents_, std::max<int64_t>(fitting, 256) / kLatentGroup * kLatentGroup);
  x_ = x;
  rows_ = count;
  next_ = 0;
  screened_ = screened;
}

void Scorer::plain(const Rows& x, int64_t count, const Tensor* whole, int64_t from) {
  bool there = weight_.scalar_type() == accumulator_;
  direct_ = count <= (there ? kFewRows : kFewNarrowRows) || count * D_ * latents_ <= kTinyProduct;
  begin(x, count, false, !direct_ && (eligible() || !there));
  next_ = from;
  if (direct_) x_ = wide(x, count, scratch_.tokens);
  else tokens_ = whole && whole->scalar_type() == accumulator_ ? *whole : matrix(wide(x, count, scratch_.tokens), count);
}

void Scorer::screen(const Rows& x, int64_t count) {
  narrow_ = screen_ == Screen::bf16 && dtype_ == DType::bf16 && count <= kFewNarrowRows && latents_ * D_ * 2 > kept_bytes_;
  begin(x, count, true, !narrow_);
  rounded_ = round(x, count, kTokenPanel, scratch_.tokens, scratch_.token_norms);
  combined_ = nullptr;
  if (screen_ == Screen::integers && by_strassen(count, D_)) {
    int64_t all = groups(count, kTokenPanel);
    combined_ = scratch_.combined.get<int16_t>(all * combined_integers(D_));
    parallel(all, 1, FASTSPARSE_KERNEL(integers_combine), static_cast<const int16_t*>(rounded_.rows), D_, combined_);
  }
  if (screen_ == Screen::bf16) tokens_ = over(rounded_.rows, count, D_, rounded_.stride, ScalarType::BFloat16);
}

bool Scorer::next(Stripe& stripe, int64_t most) {
  scores_.reset();  // the library may want the memory again
  if (next_ >= latents_) return false;
  int64_t count = std::min({width_, most, latents_ - next_}), offset = next_ * number_bytes(false);
  // The k-th best of twice as many latents is a bound worth the work of finding it.
  int64_t position = next_ / width_;
  stripe = {.begin = next_, .count = count, .doubled = (position & (position - 1)) == 0,
            .bias = static_cast<char*>(bias_) + offset, .D = D_};
  if (scale_) stripe.scale = static_cast<char*>(scale_) + offset;
  void* out = scratch_.scores.get<char>(rows_ * width_ * (screened_ ? 2 : number_bytes(false)));
  if (screened_) stripe.scores = screened_scores(stripe, out);
  else stripe.scores = direct_ ? direct_scores(stripe, out) : exact_scores(stripe, out);
  next_ += count;
  return true;
}

// How many of the latents make a task of our own products, which take so many together, and of which a thread had better
// go through many: their rows are fetched ahead.
int64_t Scorer::grain(int64_t latents, int64_t together) const {
  int64_t least = kTaskProducts / (rows_ * D_ + 1), share = latents / (16 * int64_t(torch::stable::get_num_threads()));
  return (std::max(least, share) / together + 1) * together;
}

const void* Scorer::direct_scores(const Stripe& stripe, void* out) const {
  parallel(stripe.count, grain(stripe.count, kScoredTogether), FASTSPARSE_KERNEL(rows_score), x_, rows_, weight(stripe.begin), stripe.count, out);
  return out;
}

const void* Scorer::exact_scores(const Stripe& stripe, void* out) {
  Tensor scores = over(out, rows_, stripe.count, stripe.count, accumulator_);
  if (D_ == 0) torch::stable::zero_(scores);
  else scores = product(*tokens_, wide_latents(stripe.begin, stripe.count), scores);
  return (scores_ = scores)->const_data_ptr();
}

// Rows in the accumulation type: where they lie, if that serves.
Rows Scorer::wide(const Rows& rows, int64_t count, Scratch& scratch) const {
  DType type = fp64() ? DType::f64 : DType::f32;
  if (!rows.order && rows.dtype == type) return rows;
  void* copies = scratch.get<char>(count * D_ * number_bytes(false));
  parallel(count, 16, FASTSPARSE_KERNEL(rows_widen), rows, copies);
  return {copies, nullptr, D_, D_, type};
}

// As the product takes rows of the accumulation type.
Tensor Scorer::matrix(const Rows& rows, int64_t count) const {
  return over(rows.data, count, D_, rows.stride, accumulator_);
}

Tensor Scorer::wide_latents(int64_t begin, int64_t count) {
  bool there = !eligible() && weight_.scalar_type() == accumulator_;
  if (there && count == latents_) return weight_;
  if (there || latents_ * D_ * number_bytes(false) > kept_bytes_) return matrix(wide(weight(begin), count, scratch_.wide), count);
  if (!all_wide_) all_wide_ = wide(weight(), latents_, scratch_.wide);
  return over(static_cast<const char*>(all_wide_->data) + begin * D_ * number_bytes(false), count, D_, D_, accumulator_);
}

Rounded Scorer::unrounded(int64_t count, Scratch& norms) const {
  int64_t apart = count + kPad;
  float* norm = norms.get<float>(4 * apart);
  return {nullptr, D_, norm, norm + apart, norm + 2 * apart};
}

// To bf16, which may be where they lie, or in panels of so many rows; with room for one more number a row beside its norms
// and scale.
Rounded Scorer::round(const Rows& rows, int64_t count, int64_t height, Scratch& copies, Scratch& norms) const {
  Rounded to = unrounded(count, norms);
  if (screen_ == Screen::integers) {
    int64_t all = groups(count, height) * strassen::kSide;
    to.rows = copies.get<int16_t>(all * panel_integers(D_, height));
    parallel(all, 1, FASTSPARSE_KERNEL(integers_round), rows, count, height, to);
    return to;
  }
  bool in_panels = screen_ == Screen::bf16_panels;
  if (in_panels) {
    to.rows = copies.get<bf16>(panels(count, height) * panel_bf16s(D_, height));
  } else if (rows.dtype == DType::bf16 && !rows.order) {
    to.rows = const_cast<void*>(rows.data);
    to.stride = rows.stride;
  } else {
    to.rows = copies.get<bf16>(count * D_);
  }
  parallel(count, 16, FASTSPARSE_KERNEL(rows_round), rows, in_panels ? height : 1, to);
  return to;
}

void Scorer::round_latents(int64_t begin, int64_t count) {
  latents_rounded_ = round(weight(begin), count, kLatentPanel, scratch_.rounded, scratch_.norms);
}

// Rounded latents' terms of the error bracket (derived in cpu/bracket.h), scaled as the keys are.
Brackets Scorer::brackets(int64_t begin, int64_t count) const {
  float *norm = latents_rounded_.norm, *residual = latents_rounded_.residual, *rest = latents_rounded_.scale + count + kPad;
  const float *bias = static_cast<float*>(bias_) + begin, *scale = scale_ ? static_cast<float*>(scale_) + begin : nullptr;
  Brackets brackets{norm, residual, rest};
  float flushed = float(std::sqrt(double(D_)) * 0x1p-125);
  auto raise = [](float& most, float value) {
    most = value <= FLT_MAX ? std::max(most, value) : std::numeric_limits<float>::infinity();
  };
  for (int64_t m = 0; m < count; ++m) {
    float factor = scale ? std::fabs(scale[m]) : 1.0f;
    rest[m] = (0x1p-20f * std::fabs(bias[m]) + flushed * norm[m] + float(D_) * 0x1p-124f) * factor;
    residual[m] = (residual[m] + flushed) * factor;
    norm[m] *= factor;
    raise(brackets.most_norm, norm[m]);
    raise(brackets.most_residual, residual[m]);
    raise(brackets.most_rest, rest[m]);
  }
  return brackets;
}

// And sets what a stripe's brackets are made of.
const void* Scorer::screened_scores(Stripe& stripe, void* out) {
  stripe.x_norm = rounded_.norm;
  stripe.x_residual = rounded_.residual;
  if (narrow_) {
    latents_rounded_ = unrounded(stripe.count, scratch_.norms);
    Rows tokens{rounded_.rows, nullptr, rounded_.stride, D_, DType::bf16};
    parallel(stripe.count, grain(stripe.count, kNarrowTogether), FASTSPARSE_KERNEL(rows_score_bf16), tokens, rows_,
             weight(stripe.begin), latents_rounded_, stripe.count, static_cast<bf16*>(out));
    stripe.brackets = brackets(stripe.begin, stripe.count);
    return out;
  }
  bool kept = latents_ * D_ * 2 <= kept_bytes_;
  if (kept && !all_brackets_) {
    round_latents(0, latents_);
    all_brackets_ = brackets(0, latents_);
  } else if (!kept) {
    round_latents(stripe.begin, stripe.count);
  }
  stripe.brackets = kept ? *all_brackets_ : brackets(stripe.begin, stripe.count);
  int64_t begin = kept ? stripe.begin : 0;
  for (const float** terms : {&stripe.brackets.norm, &stripe.brackets.residual, &stripe.brackets.rest}) *terms += begin;
  if (screen_ == Screen::bf16) {
    int64_t stride = latents_rounded_.stride;
    auto* rows = static_cast<const bf16*>(latents_rounded_.rows) + begin * stride;
    scores_ = product(*tokens_, over(rows, stripe.count, D_, stride, ScalarType::BFloat16),
                      over(out, rows_, stripe.count, stripe.count, ScalarType::BFloat16));
    return scores_->const_data_ptr();
  }
  int64_t before = begin / kLatentPanel;
  auto* scores = static_cast<bf16*>(out);
  if (screen_ == Screen::integers) {
    auto* latents = static_cast<const int16_t*>(latents_rounded_.rows) + before * panel_integers(D_, kLatentPanel);
    auto* tokens = combined_ ? combined_ : static_cast<const int16_t*>(rounded_.rows);
    IntegerProduct args{tokens, combined_ != nullptr, rounded_.scale, latents, latents_rounded_.scale + begin, rows_,
                        stripe.count, D_, scores, fused_integers()};
    parallel(groups(stripe.count, kLatentPanel), 1, FASTSPARSE_KERNEL(integers_product), args);
  } else if constexpr (kBf16Panels) {
    auto* latents = static_cast<const bf16*>(latents_rounded_.rows) + before * panel_bf16s(D_, kLatentPanel);
    Bf16Product args{static_cast<const bf16*>(rounded_.rows), latents, rows_, stripe.count, D_, scores};
    parallel(panels(stripe.count, kLatentPanel), 1, FASTSPARSE_KERNEL(bf16_panels_product), args);
  }
  return out;
}

}  // namespace fastsparse::edge
