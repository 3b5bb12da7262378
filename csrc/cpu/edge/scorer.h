// Scores of rows with latents, one stripe of latents after another, by the library's products.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "cpu/edge/edge.h"
#include "cpu/rows.h"
#include "cpu/screen.h"

namespace fastsparse::edge {

inline constexpr int64_t kMaxRows = 2048;  // at a time: scratch stays O(kMaxRows)

// What a screen's product is of: of bf16 where the processor multiplies that faster than fp32, by the library or, on Arm,
// by our own; else of integers, by our own.
enum class Screen { bf16, bf16_panels, integers };
Screen screen_here();
// Whether products in fewer bits decide first which latents are scored exactly: where that pays, or as tests will have
// it.
bool screens(DType dtype, int64_t N, int64_t D, int64_t latents, int64_t k);

// What becomes of a stripe is up to a filter, which keeps candidates and is called for each:
//   Candidates found = scorer.candidates(count, k, capacity, absolute, screened);
//   scorer.plain(x, count);
//   for (Stripe stripe; scorer.next(stripe);) parallel(count, 8, FASTSPARSE_KERNEL(topk_encode_filter), found, stripe);
// A thread may have one scorer at a time that keeps no copies.
class Scorer {
 public:
  // The latents are rows of weight (M, D): those that `mask` (M) has, or all. Copies of them that products need are kept
  // for all rows to come where they take no more than `kept_bytes`, and else made stripe by stripe.
  Scorer(const Tensor& weight, const std::optional<Tensor>& mask, int64_t kept_bytes);
  ~Scorer();

  int64_t latents() const { return latents_; }
  const int64_t* eligible() const { return eligible_.empty() ? nullptr : eligible_.data(); }  // null: all are
  // The rows of the latents from one on, where they lie.
  Rows weight(int64_t begin = 0) const;
  // What is added to the scores and what the sums are multiplied by, (M), before the first rows. A scale for the caller
  // to fill is by latent, of the accumulation type.
  void add_terms(const std::optional<Tensor>& bias, const std::optional<Tensor>& scale);
  void* new_scale() { return scale_ = zeros(scratch_.scale); }
  const void* bias() const { return bias_; }  // by latent, of the accumulation type
  const void* scale() const { return scale_; }  // likewise; null for none
  // A vector (M) by latent, of the accumulation type, readable up to a whole SIMD vector past its end.
  void* per_latent(const Tensor& vector, Scratch& scratch) const;

  // Lists for `rows` rows, with no candidates as yet.
  Candidates candidates(int64_t rows, int64_t k, int64_t capacity, bool absolute, bool screened);
  // How many rows' lists are no burden: a larger capacity takes fewer rows at a time.
  int64_t most_rows(int64_t capacity, bool screened) const;

  // Both begin with the first stripe of the scores of `count` rows: exact ones, from one latent on, or bf16 ones in
  // brackets. `whole` is a tensor of just these rows, if there is one: another costs a twentieth of a tiny call.
  void plain(const Rows& x, int64_t count, const Tensor* whole = nullptr, int64_t from = 0);
  void screen(const Rows& x, int64_t count);
  // Of no more than `most` latents.
  bool next(Stripe& stripe, int64_t most = std::numeric_limits<int64_t>::max());

 private:
  struct Workspace {
    Scratch bias, scale, lists, counts, thresholds, scores, tokens, token_norms, combined, wide, rounded, norms;
    static Workspace& of_this_thread();
  };
  bool fp64() const { return accumulator_ == ScalarType::Double; }
  int64_t number_bytes(bool screened) const { return fp64() && !screened ? 8 : 4; }
  void* zeros(Scratch& scratch) const;
  void begin(const Rows& x, int64_t count, bool screened, bool copied);
  Rows wide(const Rows& rows, int64_t count, Scratch& scratch) const;
  Tensor matrix(const Rows& rows, int64_t count) const;
  Tensor wide_latents(int64_t begin, int64_t count);
  Rounded round(const Rows& rows, int64_t count, int64_t height, Scratch& copies, Scratch& norms) const;
  int64_t grain(int64_t latents, int64_t together) const;
  const void* direct_scores(const Stripe& stripe, void* out) const;
  const void* exact_scores(const Stripe& stripe, void* out);
  Rounded unrounded(int64_t count, Scratch& norms) const;
  void round_latents(int64_t begin, int64_t count);
  Brackets brackets(int64_t begin, int64_t count) const;
  const void* screened_scores(Stripe& stripe, void* out);

  Tensor weight_;
  int64_t D_, latents_, kept_bytes_;
  DType dtype_;
  ScalarType accumulator_;
  Screen screen_;
  std::vector<int64_t> eligible_;  // empty: all are
  void *bias_ = nullptr, *scale_ = nullptr;
  // Of the rows at hand:
  Rows x_{};
  int64_t rows_ = 0, width_ = 1, next_ = 0;
  bool screened_ = false;
  bool direct_ = false, narrow_ = false;  // by our own products, of rows of the weight as they are: exact ones, or of bf16
  Rounded rounded_, latents_rounded_;
  int16_t* combined_ = nullptr;  // integers for Strassen's product
  std::optional<Tensor> tokens_, scores_;  // as the product takes and gives them
  // Of all latents, where copies are kept:
  std::optional<Rows> all_wide_;
  std::optional<Brackets> all_brackets_;
  Workspace own_;  // of a scorer that keeps copies
  Workspace& scratch_ = kept_bytes_ ? own_ : Workspace::of_this_thread();
};

}  // namespace fastsparse::edge
