#include "cuda/pursuit.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/knobs.h"
#include "cuda/norms.h"
#include "cuda/rows.h"
#include "cuda/tensor_cores.h"

namespace fastsparse::cuda {

namespace {

constexpr int64_t kDeepestStep = 8192;  // as kDeepestGram, for scores that are fresh in every step
constexpr int64_t kFewRows = 128;       // with fewer a product wastes its tiles
constexpr int64_t kMostScoreBytes = int64_t{256} << 20;
// Of a block of rows: scores that a step chooses by stay in the L2 cache; first scores are read once, and more rows keep
// the machine busy to the end.
constexpr int64_t kStepScoreBytes = int64_t{32} << 20, kFirstScoreBytes = kMostScoreBytes;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename C> constexpr ScalarType type_of() {
  return sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
}

// See pursuit.cuh. What gets lost where products or the library's operands are subnormal is less than the
// smallest normal number, for each of D products.
template <typename C> Rounding rounding_of(int64_t D, bool normalized, bool split) {
  using Limits = std::numeric_limits<C>;
  double unit = double(Limits::epsilon()) / 2, sum = double(D + 8) * unit;
  Rounding rounding{};
  rounding.unit = unit;
  rounding.product = sum < 0.5 ? sum / (1 - sum) : std::numeric_limits<double>::infinity();
  rounding.direction = normalized ? 0 : 2 * unit + (sizeof(C) == 8 ? rounding.product : 0);
  if (split) rounding.product += 3.1 * 0x1p-16 + 1.02 * accumulation_error(3 * D);
  rounding.dot = double(ceil_div(D, 32) + 16) * unit;
  rounding.lost = 2 * double(D + 8) * double(Limits::min());
  return rounding;
}

}  // namespace

template <typename T>
Pursuit<T>::Pursuit(const Tensor& x, const Tensor& dictionary, std::optional<int64_t> k, double tol, bool nonnegative,
                    bool normalized, bool by_gram)
    : call_(x), x_(x), dictionary_(with_unit_stride(dictionary)), N_(x.size(0)), D_(x.size(1)), M_(dictionary.size(0)),
      k_(k.value_or(1)) {
  constexpr int64_t packet = Packet<C>::size;
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - (int64_t{1} << 16);
  if (M_ < 1 || M_ > most || D_ > most)
    throw std::invalid_argument("matching_pursuit: dictionary must have at least one row, and fewer than 2^31 - 2^16 "
                                "rows and columns, got " + std::to_string(M_) + " and " + std::to_string(D_));
  values_ = k ? allocate(x, {N_, k_}, x.scalar_type()) : allocate(x, {N_}, x.scalar_type());
  indices_ = k ? allocate(x, {N_, k_}, ScalarType::Long) : allocate(x, {N_}, ScalarType::Long);
  residual_ = allocate(x, {N_, D_}, x.scalar_type());
  if (N_ == 0) return;

  // Directions are the atoms themselves where these are of norm 1 and laid out as the kernels want them.
  int64_t depth = round_up(D_, packet), latents = round_up(M_, packet), part = round_up(D_, Packet<bf16>::size);
  bool packets = takes_packets<T>(dictionary_, D_);
  bool ready = normalized && std::is_same_v<T, C> && packets && latents == M_;
  split_ = splits(by_gram);
  Directions<C> directions{};
  directions.latents = latents;
  directions.depth = depth;
  if (split_) {
    directions_ = allocate(x, {latents, 3 * part}, ScalarType::BFloat16);
    directions.right = {mutable_data<bf16>(directions_), part};
    if (by_gram) {
      left_directions_ = allocate(x, {latents, 3 * part}, ScalarType::BFloat16);
      directions.left = {mutable_data<bf16>(left_directions_), part};
    }
  } else if (ready) {
    directions_ = dictionary_;
  } else {
    directions_ = allocate(x, {latents, depth}, type_of<C>());
    directions.whole = mutable_data<C>(directions_);
  }
  longest_ = allocate(x, {1}, ScalarType::Double);
  torch::stable::zero_(longest_);
  squares_ = squared_norms(call_, dictionary_);
  const double* squares = data<double>(squares_);
  call_.launch("matching_pursuit_prepare", matching_pursuit_prepare<T>, ceil_div(latents, kAtomThreads / kWarp),
               kAtomThreads, 0, data<T>(dictionary_), dictionary_.stride(0), M_, D_, normalized, squares,
               mutable_data<double>(longest_), directions);

  int64_t row_bytes = latents * int64_t(sizeof(C));
  int64_t score_bytes = by_gram ? kFirstScoreBytes : kStepScoreBytes;
  block_ = std::max<int64_t>(1, std::max(score_bytes / row_bytes, std::min(kFewRows, kMostScoreBytes / row_bytes)));
  block_ = std::min(N_, knobs.rows ? knobs.rows : block_);
  residuals_ = allocate(x, {block_, depth}, type_of<C>());
  scores_ = allocate(x, {block_, latents}, type_of<C>());
  steps_ = allocate(x, {block_}, ScalarType::Int);
  if (split_) left_residuals_ = allocate(x, {block_, 3 * part}, ScalarType::BFloat16);
  atoms_ = {data<T>(dictionary_), dictionary_.stride(0), int(M_), int(D_), packets, normalized ? nullptr : squares,
            data<double>(longest_)};
  work_ = {mutable_data<C>(residuals_), mutable_data<C>(scores_), int(depth), int(latents),
           mutable_data<int32_t>(steps_)};
  goal_ = {nullptr, nullptr, k_, tol, nonnegative, rounding_of<C>(D_, normalized, split_)};
}

// Whether products run on tensor cores: there must be enough to multiply, and their errors must leave few candidates.
template <typename T> bool Pursuit<T>::splits(bool by_gram) const {
  bool possible = std::is_same_v<C, float> && D_ > 0 && D_ <= (by_gram ? kDeepestGram : kDeepestStep);
  return possible && (knobs.screening >= 0 ? knobs.screening == 1 : N_ >= kFewRows && D_ >= 64 && M_ >= 1024);
}

// Enough for what a row streams, few enough to share barriers cheaply.
template <typename T> int64_t Pursuit<T>::threads() const {
  if (knobs.threads) return knobs.threads;
  int64_t threads = kWarp, streamed = std::max<int64_t>(work_.latents, 4 * int64_t{work_.depth});
  while (threads < kPursuitThreads && threads * 64 < streamed) threads *= 2;
  return threads;
}

template <typename T> Tensor Pursuit<T>::block_of(const Tensor& scratch, int64_t columns) const {
  return torch::stable::from_blob(scratch.mutable_data_ptr(), {rows_, columns}, {columns, 1}, x_.device(),
                                  scratch.scalar_type());
}

template <typename T> Tensor Pursuit<T>::gram() const {
  Tensor out = allocate(x_, {work_.latents, work_.latents}, type_of<C>());
  product(split_ ? left_directions_ : directions_, directions_, out);
  return out;
}

template <typename T> void Pursuit<T>::load(int64_t begin, int64_t rows) {
  begin_ = begin;
  rows_ = rows;
  goal_.values = mutable_data<T>(values_) + begin * k_;
  goal_.indices = mutable_data<int64_t>(indices_) + begin * k_;
  call_.launch("matching_pursuit_load", matching_pursuit_load<T>, ceil_div(rows * int64_t{work_.depth}, kAtomThreads),
               kAtomThreads, 0, data<T>(x_) + begin * x_.stride(0), x_.stride(0), x_.stride(1), rows, D_,
               work_.residuals, int64_t{work_.depth});
}

template <typename T> void Pursuit<T>::score() {
  Tensor residuals = block_of(residuals_, work_.depth);
  if constexpr (std::is_same_v<C, float>)
    if (split_) {
      residuals = block_of(left_residuals_, left_residuals_.size(1));
      Split left{mutable_data<bf16>(left_residuals_), left_residuals_.size(1) / 3};
      call_.launch("matching_pursuit_split", matching_pursuit_split<C>, ceil_div(rows_ * left.depth, kAtomThreads),
                   kAtomThreads, 0, work_.residuals, int64_t{work_.depth}, rows_, D_, left);
    }
  product(residuals, directions_, block_of(scores_, work_.latents));
}

template <typename T> void Pursuit<T>::take(int64_t t) {
  call_.launch("matching_pursuit_take", matching_pursuit_take<T>, rows_, threads(), 0, atoms_, goal_, work_, t);
}

template <typename T> void Pursuit<T>::store() {
  call_.launch("matching_pursuit_store", matching_pursuit_store<T>, ceil_div(rows_ * D_, kAtomThreads), kAtomThreads, 0,
               work_.residuals, int64_t{work_.depth}, rows_, D_, mutable_data<T>(residual_) + begin_ * D_);
}

template class Pursuit<float>;
template class Pursuit<bf16>;
template class Pursuit<f16>;
template class Pursuit<double>;

}  // namespace fastsparse::cuda
