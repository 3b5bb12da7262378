#include "cpu/edge/matching_pursuit_step.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/edge/dictionary.h"
#include "cpu/edge/product.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kCopyBytes = int64_t{1} << 30;  // of a dictionary in a product's type
constexpr int64_t kFewRows = 8;                   // a product would read no less than a search

}  // namespace

PursuitSteps::PursuitSteps(const Tensor& dictionary, bool nonnegative, bool normalized)
    : nonnegative_(nonnegative), scorer_(dictionary, std::nullopt, kCopyBytes),
      accumulator_(dictionary.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32),
      accumulator_bytes_(accumulator_ == DType::f64 ? 8 : 4) {
  int64_t M = scorer_.latents();
  if (M < 1 || M >= std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("matching_pursuit: dictionary must have at least one atom and fewer than 2^31, got " +
                                std::to_string(M));
  Rows rows = scorer_.weight();
  atoms_ = {rows.data, rows.stride, rows.D, rows.dtype, nullptr, nullptr, nullptr};
  scorer_.add_terms(std::nullopt, std::nullopt);
  sizes_.largest = sizes_.largest_raw = kLargestPromised;
  if (normalized) return;
  atoms_.squares = squares_.get<double>(M);
  atoms_.inverse = inverse_.get<double>(M);
  atoms_.scale = scorer_.new_scale();
  parallel(M, 64, FASTSPARSE_KERNEL(matching_pursuit_step_norms), atoms_);
  sizes_ = sizes_of(atoms_.squares, M, normalized);
}

void PursuitSteps::take(void* residual, const int64_t* rows, int64_t count, void* values, int64_t* indices) {
  if (atoms_.D == 0) {  // no step, and no memory to point at
    std::fill(indices, indices + count, 0);
    std::fill(static_cast<char*>(values), static_cast<char*>(values) + count * accumulator_bytes_, 0);
    return;
  }
  bool brackets = sizes_.smallest >= std::numeric_limits<float>::min();  // the scales aren't cut
  for (int64_t done = 0; done < count; done += kMaxRows) {
    int64_t some = std::min(kMaxRows, count - done);
    PursuitArgs args{atoms_, from(done, {residual, rows}), nonnegative_};
    if (brackets && screens(atoms_.dtype, some, atoms_.D, scorer_.latents(), 1)) screen(args, some, indices + done);
    else plain(args, some, indices + done);
    void* value = static_cast<char*>(values) + done * accumulator_bytes_;
    parallel(some, 16, FASTSPARSE_KERNEL(matching_pursuit_step_take), args, value, indices + done);
  }
}

Residuals PursuitSteps::from(int64_t i, Residuals residuals) const {
  if (residuals.rows) residuals.rows += i;
  else residuals.data = static_cast<char*>(residuals.data) + i * atoms_.D * accumulator_bytes_;
  return residuals;
}

Rows PursuitSteps::rows_of(const PursuitArgs& args) const {
  return {args.residuals.data, args.residuals.rows, atoms_.D, atoms_.D, accumulator_};
}

// By bf16 scores, then exact ones of what survives.
void PursuitSteps::screen(const PursuitArgs& args, int64_t rows, int64_t* chosen) {
  Candidates found = scorer_.candidates(rows, 1, 128, !nonnegative_, true);
  scorer_.screen(rows_of(args), rows);
  for (Stripe stripe; scorer_.next(stripe);) parallel(rows, 8, FASTSPARSE_KERNEL(screen), found, stripe);
  parallel(rows, 16, FASTSPARSE_KERNEL(matching_pursuit_step_choose), args, found, chosen);
  rescue(args, rows, chosen, &PursuitSteps::plain);
}

// By the library's scores, then exact ones of what survives.
void PursuitSteps::plain(const PursuitArgs& args, int64_t rows, int64_t* chosen) {
  if (rows <= kFewRows || !sizes_.regular || !trusts_product()) return search(args, rows, chosen);
  Candidates found = scorer_.candidates(rows, 1, 256, !nonnegative_, false);
  double* lengths = lengths_.get<double>(rows);
  parallel(rows, 64, FASTSPARSE_KERNEL(matching_pursuit_step_lengths), args, lengths);
  scorer_.plain(rows_of(args), rows);
  for (Stripe stripe; scorer_.next(stripe);)
    parallel(rows, 8, FASTSPARSE_KERNEL(matching_pursuit_step_sift), args, lengths, sizes_, found, stripe);
  parallel(rows, 16, FASTSPARSE_KERNEL(matching_pursuit_step_choose), args, found, chosen);
  rescue(args, rows, chosen, &PursuitSteps::search);
}

bool PursuitSteps::trusts_product() {
  if (!trusted_) trusted_ = in_full_precision(accumulator_ == DType::f64 ? ScalarType::Double : ScalarType::Float);
  return *trusted_;
}

// Against one atom after the other.
void PursuitSteps::search(const PursuitArgs& args, int64_t count, int64_t* chosen) {
  int64_t M = scorer_.latents(), grain = std::max<int64_t>(64, M / (4 * int64_t(torch::stable::get_num_threads())));
  int64_t pieces = (M + grain - 1) / grain;
  std::vector<Best> found(pieces * kFewRows);
  for (int64_t done = 0; done < count; done += kFewRows) {
    int64_t rows = std::min(kFewRows, count - done);
    PursuitArgs few = args;
    few.residuals = from(done, args.residuals);
    parallel(M, grain, FASTSPARSE_KERNEL(matching_pursuit_step_search), few, rows, grain, found.data());
    for (int64_t i = 0; i < rows; ++i) {
      Best best = found[i];
      for (int64_t p = 1; p < pieces; ++p) {
        const Best& other = found[p * rows + i];
        bool first = best.atom < 0 || other.key > best.key || (other.key != other.key && best.key == best.key);
        if (other.atom >= 0 && first) best = other;
      }
      chosen[done + i] = best.atom;
    }
  }
}

// Chooses anew for the rows that are hopeless as yet.
void PursuitSteps::rescue(PursuitArgs args, int64_t count, int64_t* chosen,
                          void (PursuitSteps::*choose)(const PursuitArgs&, int64_t, int64_t*)) {
  std::vector<int64_t> places, rows;
  for (int64_t i = 0; i < count; ++i) {
    if (chosen[i] != kHopeless) continue;
    places.push_back(i);
    rows.push_back(args.residuals.rows ? args.residuals.rows[i] : i);
  }
  if (places.empty()) return;
  std::vector<int64_t> found(places.size());
  args.residuals.rows = rows.data();
  (this->*choose)(args, int64_t(rows.size()), found.data());
  for (size_t i = 0; i < places.size(); ++i) chosen[places[i]] = found[i];
}

std::tuple<Tensor, Tensor, Tensor> matching_pursuit_step(const Tensor& residual, const Tensor& dictionary,
                                                         bool nonnegative, bool normalized) {
  InFloatMode mode(Subnormals::kept);
  int64_t N = residual.size(0), D = residual.size(1);
  ScalarType accumulator = accumulator_of(residual.scalar_type());
  Tensor rows = with_unit_stride(residual), after = allocate({N, D}, accumulator), value = allocate({N}, accumulator),
         index = allocate({N}, ScalarType::Long);
  void* left = after.mutable_data_ptr();
  Rows before{rows.const_data_ptr(), nullptr, rows.stride(0), D, dtype_of(residual)};
  parallel(N, 16, FASTSPARSE_KERNEL(rows_widen), before, left);
  PursuitSteps(dictionary, nonnegative, normalized)
      .take(left, nullptr, N, value.mutable_data_ptr(), index.mutable_data_ptr<int64_t>());
  return {as_contiguous(value, residual.scalar_type()), index, as_contiguous(after, residual.scalar_type())};
}

FASTSPARSE_REGISTER(fastsparse, CPU, matching_pursuit_step)

}  // namespace fastsparse::edge
