#include "cpu/edge/matching_pursuit_step.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/edge/dictionary.h"
#include "cpu/edge/product.h"
#include "cpu/edge/screening.h"
#include "cpu/matching_pursuit_step.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kMaxRows = 2048;                  // rows at a time: scratch stays O(kMaxRows)
constexpr int64_t kStripeBytes = int64_t{8} << 20;  // of scores, and of copied atoms: both stay in the shared cache
constexpr int64_t kCopyBytes = int64_t{1} << 30;    // of a dictionary in the product's type; else stripe by stripe
constexpr int64_t kFewRows = 8;                     // a product would read no less than a search
constexpr int64_t kPad = 64;                        // kernels read whole vectors

}  // namespace

class PursuitSteps::Impl {
 public:
  Impl(const Tensor& dictionary, bool nonnegative, bool normalized)
      : dictionary_(with_unit_stride(dictionary)), M_(dictionary.size(0)), D_(dictionary.size(1)),
        accumulator_(accumulator_of(dictionary.scalar_type())), nonnegative_(nonnegative),
        atoms_{dictionary_.const_data_ptr(), dictionary_.stride(0), D_, dtype_of(dictionary), nullptr, nullptr, nullptr} {
    if (M_ < 1 || M_ >= std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("matching_pursuit: dictionary must have at least one atom and fewer than 2^31, got " +
                                  std::to_string(M_));
    bias_ = zeros(bias_zeros_);
    sizes_.largest = sizes_.largest_raw = kLargestPromised;
    if (normalized) return;
    atoms_.squares = squares_.get<double>(M_);
    atoms_.inverse = inverse_.get<double>(M_);
    atoms_.scale = zeros(scale_);
    parallel(M_, 64, [&, run = FASTSPARSE_KERNEL(matching_pursuit_step_norms)](int64_t b, int64_t e) {
      run(atoms_, b, e);
    });
    sizes_ = sizes_of(atoms_.squares, M_, normalized);
  }

  void take(void* residual, const int64_t* rows, int64_t count, void* values, int64_t* indices) {
    if (D_ == 0) {  // no step, and no memory to point at
      std::fill(indices, indices + count, 0);
      std::fill(static_cast<char*>(values), static_cast<char*>(values) + count * accumulator_bytes(), 0);
      return;
    }
    for (int64_t done = 0; done < count; done += kMaxRows) {
      PursuitArgs args{atoms_, {rows ? residual : row(residual, done), rows ? rows + done : nullptr}, nonnegative_};
      void* value = static_cast<char*>(values) + done * accumulator_bytes();
      take_block(args, std::min(kMaxRows, count - done), value, indices + done);
    }
  }

 private:
  bool fp64() const { return atoms_.dtype == DType::f64; }
  int64_t accumulator_bytes() const { return fp64() ? 8 : 4; }
  const void* atom(int64_t m) const {
    return static_cast<const char*>(atoms_.rows) + m * atoms_.stride * int64_t(dictionary_.element_size());
  }
  void* row(void* rows, int64_t i) const { return static_cast<char*>(rows) + i * D_ * accumulator_bytes(); }

  // A vector over the atoms in the accumulation type.
  char* zeros(Scratch& scratch) const {
    char* result = scratch.get<char>((M_ + kPad) * accumulator_bytes());
    std::fill(result, result + (M_ + kPad) * accumulator_bytes(), 0);
    return result;
  }

  void take_block(const PursuitArgs& args, int64_t count, void* values, int64_t* chosen) {
    bool brackets = sizes_.smallest >= std::numeric_limits<float>::min();  // the scales aren't cut
    if (brackets && screens(atoms_.dtype, count, D_, M_, 1)) screen(args, count, chosen);
    else plain(args, count, chosen);
    parallel(count, 16, [&, run = FASTSPARSE_KERNEL(matching_pursuit_step_take)](int64_t b, int64_t e) {
      run(args, values, chosen, b, e);
    });
  }

  // Chooses anew for the rows that are hopeless as yet.
  void rescue(PursuitArgs args, int64_t count, int64_t* chosen,
              void (Impl::*choose)(const PursuitArgs&, int64_t, int64_t*)) {
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

  // Few rows, or whatever rows, against one atom after the other.
  void search(const PursuitArgs& args, int64_t count, int64_t* chosen) {
    int64_t grain = std::max<int64_t>(64, M_ / (4 * int64_t(torch::stable::get_num_threads())));
    int64_t pieces = (M_ + grain - 1) / grain;
    std::vector<Best> found(pieces * kFewRows);
    for (int64_t done = 0; done < count; done += kFewRows) {
      int64_t rows = std::min(kFewRows, count - done);
      PursuitArgs few = args;
      if (few.residuals.rows) few.residuals.rows += done;
      else few.residuals.data = row(few.residuals.data, done);
      parallel(M_, grain, [&, run = FASTSPARSE_KERNEL(matching_pursuit_step_search)](int64_t b, int64_t e) {
        run(few, rows, b, e, &found[b / grain * kFewRows]);
      });
      for (int64_t i = 0; i < rows; ++i) {
        Best best = found[i];
        for (int64_t p = 1; p < pieces; ++p) {
          const Best& other = found[p * kFewRows + i];
          bool first = best.atom < 0 || other.key > best.key || (other.key != other.key && best.key == best.key);
          if (other.atom >= 0 && first) best = other;
        }
        chosen[done + i] = best.atom;
      }
    }
  }

  // The candidates of topk_encode's kernels, none as yet.
  template <typename C> Candidates candidates(int64_t rows, int64_t capacity) {
    int32_t* counts = counts_.get<int32_t>(rows);
    std::fill(counts, counts + rows, 0);
    C* thresholds = thresholds_.get<C>(rows);
    std::fill(thresholds, thresholds + rows, -std::numeric_limits<C>::infinity());
    return {1, capacity, !nonnegative_, lists_.get<char>(rows * list_bytes(capacity, sizeof(C))), counts, thresholds};
  }

  Stripe stripe(int64_t begin, int64_t count, int64_t atoms) const {
    int64_t position = begin / atoms;
    Stripe stripe{.begin = begin, .count = count, .doubled = (position & (position - 1)) == 0};
    stripe.bias = bias_;
    if (atoms_.scale) stripe.scale = static_cast<const char*>(atoms_.scale) + begin * accumulator_bytes();
    return stripe;
  }

  // How many atoms to score at a time, in whole vectors.
  int64_t stripe_atoms(int64_t rows, int64_t element_bytes) const {
    int64_t fitting = kStripeBytes / (element_bytes * std::max(rows, D_));
    return std::min(M_, std::max<int64_t>(fitting, 256) / 16 * 16);
  }

  void choose(const PursuitArgs& args, const Candidates& found, int64_t rows, int64_t* chosen) {
    parallel(rows, 16, [&, run = FASTSPARSE_KERNEL(matching_pursuit_step_choose)](int64_t b, int64_t e) {
      run(args, found, chosen, b, e);
    });
  }

  // ---- plain: the library's scores, then exact ones of what survives ----

  void plain(const PursuitArgs& args, int64_t rows, int64_t* chosen) {
    if (rows <= kFewRows || !sizes_.regular || !trusts_product()) return search(args, rows, chosen);
    constexpr int64_t capacity = 256;
    Candidates found = fp64() ? candidates<double>(rows, capacity) : candidates<float>(rows, capacity);
    int64_t atoms = stripe_atoms(rows, accumulator_bytes());
    DType type = fp64() ? DType::f64 : DType::f32;
    const void* data = args.residuals.data;
    if (args.residuals.rows) data = widen({data, args.residuals.rows, D_, D_, type, nullptr}, rows, tokens_);
    Tensor residuals = over(data, rows, D_, D_, accumulator_);
    char* scratch = scores_.get<char>(rows * atoms * accumulator_bytes());
    double* lengths = lengths_.get<double>(rows);
    parallel(rows, 64, [&, run = FASTSPARSE_KERNEL(matching_pursuit_step_lengths)](int64_t b, int64_t e) {
      run(args, lengths, b, e);
    });
    for (int64_t m = 0; m < M_; m += atoms) {
      int64_t count = std::min(atoms, M_ - m);
      Tensor scores = product(residuals, wide_atoms(m, count), over(scratch, rows, count, count, accumulator_));
      SiftArgs sift{found, scores.const_data_ptr(), m, count, lengths, sizes_};
      parallel(rows, 8, [&, run = FASTSPARSE_KERNEL(matching_pursuit_step_sift)](int64_t b, int64_t e) {
        run(args, sift, b, e);
      });
    }
    choose(args, found, rows, chosen);
    rescue(args, rows, chosen, &Impl::search);
  }

  bool trusts_product() {
    if (!trusted_) trusted_ = in_full_precision(accumulator_);
    return *trusted_;
  }

  void* widen(WidenArgs args, int64_t count, Scratch& scratch) {
    args.widened = scratch.get<char>(count * D_ * accumulator_bytes());
    parallel(count, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_widen)](int64_t b, int64_t e) { run(args, b, e); });
    return args.widened;
  }

  // Atoms in the accumulation type: the dictionary's own memory where that serves, else a copy, of all where it fits.
  Tensor wide_atoms(int64_t begin, int64_t count) {
    auto copy = [&](int64_t first, int64_t some) {
      return widen({atom(first), nullptr, atoms_.stride, D_, atoms_.dtype, nullptr}, some, wide_copy_);
    };
    if (dictionary_.scalar_type() == accumulator_) return over(atom(begin), count, D_, atoms_.stride, accumulator_);
    if (M_ * D_ * accumulator_bytes() > kCopyBytes) return over(copy(begin, count), count, D_, D_, accumulator_);
    if (!wide_) wide_ = copy(0, M_);
    return over(row(wide_, begin), count, D_, D_, accumulator_);
  }

  // ---- screen: bf16 scores, then exact ones of what survives ----

  // Rows as bf16, and the norms that the bracket needs.
  struct Rounded {
    bf16* rows = nullptr;
    float *norm, *residual, *rest;
  };
  Rounded round(const void* rows, const int64_t* order, int64_t stride, DType type, int64_t count, Scratch& memory,
                Scratch& norms) {
    float* norm = norms.get<float>(3 * (count + kPad));
    Rounded to{memory.get<bf16>(count * D_), norm, norm + count + kPad, norm + 2 * (count + kPad)};
    RoundArgs args{rows, order, stride, D_, type, to.rows, to.norm, to.residual};
    parallel(count, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_round)](int64_t b, int64_t e) { run(args, b, e); });
    return to;
  }

  // A stripe of atoms in bf16, from a copy of all where that fits.
  std::pair<Stripe, const bf16*> rounded_atoms(Stripe stripe) {
    auto copy = [&](Stripe part) {
      rounded_ = round(atom(part.begin), nullptr, atoms_.stride, atoms_.dtype, part.count, rounded_copy_, atom_norms_);
      return bracketed(part, rounded_.norm, rounded_.residual, rounded_.rest, D_);
    };
    if (M_ * D_ * 2 > kCopyBytes) {
      Stripe result = copy(stripe);
      return {result, rounded_.rows};
    }
    if (!rounded_.rows) all_ = copy(this->stripe(0, M_, M_));
    stripe.norm = all_.norm + stripe.begin;
    stripe.residual = all_.residual + stripe.begin;
    stripe.rest = all_.rest + stripe.begin;
    stripe.most_norm = all_.most_norm;
    stripe.most_residual = all_.most_residual;
    stripe.most_rest = all_.most_rest;
    return {stripe, rounded_.rows + stripe.begin * D_};
  }

  void screen(const PursuitArgs& args, int64_t rows, int64_t* chosen) {
    constexpr int64_t capacity = 128;
    Candidates found = candidates<float>(rows, capacity);
    int64_t atoms = stripe_atoms(rows, 2);
    Rounded tokens = round(args.residuals.data, args.residuals.rows, D_, DType::f32, rows, tokens_, token_norms_);
    Tensor residuals = over(tokens.rows, rows, D_, D_, ScalarType::BFloat16);
    bf16* scratch = scores_.get<bf16>(rows * atoms);
    for (int64_t m = 0; m < M_; m += atoms) {
      int64_t count = std::min(atoms, M_ - m);
      auto [part, rounded] = rounded_atoms(stripe(m, count, atoms));
      Tensor scores = product(residuals, over(rounded, count, D_, D_, ScalarType::BFloat16),
                              over(scratch, rows, count, count, ScalarType::BFloat16));
      ScreenArgs screen{found, part, static_cast<const bf16*>(scores.const_data_ptr()), tokens.norm, tokens.residual,
                        D_};
      parallel(rows, 8, [&, run = FASTSPARSE_KERNEL(topk_encode_screen)](int64_t b, int64_t e) { run(screen, b, e); });
    }
    choose(args, found, rows, chosen);
    rescue(args, rows, chosen, &Impl::plain);
  }

  Tensor dictionary_;
  int64_t M_, D_;
  ScalarType accumulator_;
  bool nonnegative_;
  Atoms atoms_;
  const void* bias_;
  void* wide_ = nullptr;  // all atoms in the accumulation type
  Rounded rounded_;  // all atoms, or a stripe of them
  Stripe all_;
  AtomSizes sizes_;
  std::optional<bool> trusted_;
  Scratch squares_, inverse_, scale_, bias_zeros_, lengths_, counts_, thresholds_, lists_, tokens_, token_norms_, wide_copy_,
      rounded_copy_, atom_norms_, scores_;
};

PursuitSteps::PursuitSteps(const Tensor& dictionary, bool nonnegative, bool normalized)
    : impl_(std::make_unique<Impl>(dictionary, nonnegative, normalized)) {}
PursuitSteps::~PursuitSteps() = default;

void PursuitSteps::take(void* residual, const int64_t* rows, int64_t count, void* values, int64_t* indices) {
  impl_->take(residual, rows, count, values, indices);
}

std::tuple<Tensor, Tensor, Tensor> matching_pursuit_step(const Tensor& residual, const Tensor& dictionary,
                                                         bool nonnegative, bool normalized) {
  InFloatMode mode(Subnormals::kept);
  int64_t N = residual.size(0), D = residual.size(1);
  ScalarType accumulator = accumulator_of(residual.scalar_type());
  Tensor rows = with_unit_stride(residual), after = allocate({N, D}, accumulator), value = allocate({N}, accumulator),
         index = allocate({N}, ScalarType::Long);
  WidenArgs args{rows.const_data_ptr(), nullptr, rows.stride(0), D, dtype_of(residual), after.mutable_data_ptr()};
  parallel(N, 16, [&, run = FASTSPARSE_KERNEL(topk_encode_widen)](int64_t b, int64_t e) { run(args, b, e); });
  PursuitSteps(dictionary, nonnegative, normalized)
      .take(after.mutable_data_ptr(), nullptr, N, value.mutable_data_ptr(), index.mutable_data_ptr<int64_t>());
  return {as_contiguous(value, residual.scalar_type()), index, as_contiguous(after, residual.scalar_type())};
}

FASTSPARSE_REGISTER(fastsparse, CPU, matching_pursuit_step)

}  // namespace fastsparse::edge
