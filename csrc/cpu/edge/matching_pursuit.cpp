#include "cpu/matching_pursuit.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/edge/dictionary.h"
#include "cpu/edge/matching_pursuit_step.h"
#include "cpu/edge/product.h"
#include "gram.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kScoreBytes = int64_t{16} << 20;  // scores of a block of rows
constexpr size_t kKeptBytes = size_t{64} << 20;     // of scratch, from call to call

// What the ways cost, in multiplications in fp32 by the library's product. Measured on two Zen 4 cores, which do 100 of
// them a nanosecond; their memory gives 22 bytes in that time.
struct Costs {
  double direct;   // a call
  double tracked;  // a call with the Gram matrix there
  double gram;     // making that

  Costs(double N, double D, double M, double k, bool screened, double element_bytes) {
    constexpr double byte = 4.5, scan = 40;  // a byte from memory; choosing among scores, for each
    double dictionary = M * D * element_bytes * byte;
    direct = k * (std::max(N * M * D * (screened ? 0.5 : 1), dictionary) + N * M * scan);
    tracked = std::max(N * M * D, dictionary) + k * N * M * element_bytes * byte;
    gram = M * M * (0.6 * D + 3 * element_bytes * byte);  // half of the products, and some; read once and written twice
  }
};

class Pursuit {
 public:
  Pursuit(const Tensor& x, const Tensor& dictionary, int64_t k, double tol, bool nonnegative, bool normalized)
      : x_(with_unit_stride(x)), dictionary_(with_unit_stride(dictionary)), N_(x.size(0)), D_(x.size(1)),
        M_(dictionary.size(0)), k_(k), tol_(tol), nonnegative_(nonnegative), normalized_(normalized),
        dtype_(x.scalar_type()), accumulator_(accumulator_of(x.scalar_type())) {}

  std::tuple<Tensor, Tensor, Tensor> run(Method method) {
    if (N_ == 0 || D_ == 0 || method == Method::direct || !in_full_precision(accumulator_)) return direct();
    std::shared_ptr<const PreparedDictionary> dictionary = kept_dictionary(dictionary_, normalized_);
    if (!dictionary && (method == Method::gram || gram_wanted())) dictionary = prepared_dictionary(dictionary_, normalized_);
    return dictionary && dictionary->bounded() ? gram(*dictionary) : direct();
  }

 private:
  int64_t accumulator_bytes() const { return accumulator_ == ScalarType::Double ? 8 : 4; }
  DType accumulator() const { return accumulator_ == ScalarType::Double ? DType::f64 : DType::f32; }

  // Which way is faster. The answer is the same, to the bit: see pursuit.h.
  bool gram_wanted() const {
    if (k_ < 2 || !gram_fits(M_, accumulator_bytes())) return false;
    Costs costs(double(N_), double(D_), double(M_), double(k_), screens(dtype_of(x_), N_, D_, M_, 1),
                double(accumulator_bytes()));
    double gain = costs.direct - costs.tracked;
    return gain >= costs.gram || (gain > costs.direct / 4 && gram_is_due(dictionary_, normalized_, gain, costs.gram));
  }

  const void* row(int64_t n) const {
    return static_cast<const char*>(x_.const_data_ptr()) + n * x_.stride(0) * int64_t(x_.element_size());
  }

  // Tokens [begin, begin + count) in the accumulation type, at `to`.
  void widen(int64_t begin, int64_t count, void* to) const {
    Rows rows{row(begin), nullptr, x_.stride(0), D_, dtype_of(x_)};
    parallel(count, 16, FASTSPARSE_KERNEL(rows_widen), rows, to);
  }

  std::tuple<Tensor, Tensor, Tensor> gram(const PreparedDictionary& dictionary) const {
    Tensor values = allocate({N_, k_}, dtype_), indices = allocate({N_, k_}, ScalarType::Long),
           residual = allocate({N_, D_}, dtype_), atoms = dictionary.scored();
    static thread_local Scratch kept_scores, kept_tokens;  // fresh memory would cost the system's clearing of it
    int64_t bytes = accumulator_bytes();
    int64_t most = std::min(N_, std::max<int64_t>(64, kScoreBytes / (M_ * bytes)));
    auto at = [](const Tensor& tensor, int64_t n) {
      return static_cast<char*>(tensor.mutable_data_ptr()) + n * tensor.size(1) * int64_t(tensor.element_size());
    };
    for (int64_t begin = 0; begin < N_; begin += most) {
      int64_t count = std::min(most, N_ - begin);
      Tensor tokens;
      if (dtype_ == accumulator_) {
        tokens = over(row(begin), count, D_, x_.stride(0), dtype_);
      } else {
        void* wide = kept_tokens.get<char>(count * D_ * bytes);
        widen(begin, count, wide);
        tokens = over(wide, count, D_, D_, accumulator_);
      }
      void* out = kept_scores.get<char>(count * M_ * bytes);
      Tensor scores = product(tokens, atoms, over(out, count, M_, M_, accumulator_));
      GramPursuitArgs args{.M = M_, .D = D_, .k = k_, .tol = tol_, .nonnegative = nonnegative_,
                       .atoms = dictionary.atoms(), .norms = dictionary.norms(), .sizes = dictionary.sizes(),
                       .gram = dictionary.gram(), .gram_stride = dictionary.gram_stride(), .x = row(begin),
                       .x_stride = x_.stride(0),
                       .scores = scores.const_data_ptr(), .values = at(values, begin),
                       .indices = reinterpret_cast<int64_t*>(at(indices, begin)), .residual = at(residual, begin),
                       .dtype = dtype_of(x_)};
      parallel(count, std::clamp<int64_t>(count / 64, 1, 8), FASTSPARSE_KERNEL(matching_pursuit), args);
    }
    if (kept_scores.bytes() > kKeptBytes) kept_scores = Scratch();
    if (kept_tokens.bytes() > kKeptBytes) kept_tokens = Scratch();
    return {values, indices, residual};
  }

  std::tuple<Tensor, Tensor, Tensor> direct() const {
    Tensor values = allocate({N_, k_}, accumulator_), indices = allocate({N_, k_}, ScalarType::Long),
           residual = allocate({N_, D_}, accumulator_);
    torch::stable::zero_(values);
    torch::stable::zero_(indices);
    widen(0, N_, residual.mutable_data_ptr());
    if (accumulator_ == ScalarType::Double) take_steps<double>(values, indices, residual);
    else take_steps<float>(values, indices, residual);
    return {as_contiguous(values, dtype_), indices, as_contiguous(residual, dtype_)};
  }

  template <typename C> void take_steps(const Tensor& values, const Tensor& indices, const Tensor& residual) const {
    if (N_ == 0 || D_ == 0) return;
    PursuitSteps steps(dictionary_, nonnegative_, normalized_);
    C* value_out = static_cast<C*>(values.mutable_data_ptr());
    int64_t* index_out = indices.mutable_data_ptr<int64_t>();
    std::vector<int64_t> active(N_), index(N_);
    std::vector<C> value(N_);
    for (int64_t n = 0; n < N_; ++n) active[n] = n;
    for (int64_t t = 0; t < k_; ++t) {
      if (tol_ > 0) drop_finished(residual, active);
      if (active.empty()) return;
      steps.take(residual.mutable_data_ptr(), active.data(), int64_t(active.size()), value.data(), index.data());
      size_t left = 0;
      for (size_t i = 0; i < active.size(); ++i) {
        if (value[i] == 0) continue;
        value_out[active[i] * k_ + t] = value[i];
        index_out[active[i] * k_ + t] = index[i];
        active[left++] = active[i];
      }
      active.resize(left);
    }
  }

  void drop_finished(const Tensor& residual, std::vector<int64_t>& active) const {
    std::vector<double> lengths(active.size());
    LengthArgs args{residual.const_data_ptr(), active.data(), D_, lengths.data(), accumulator()};
    parallel(int64_t(active.size()), 64, FASTSPARSE_KERNEL(matching_pursuit_lengths), args);
    size_t left = 0;
    for (size_t i = 0; i < active.size(); ++i)
      if (!(lengths[i] <= tol_)) active[left++] = active[i];
    active.resize(left);
  }

  Tensor x_, dictionary_;
  int64_t N_, D_, M_, k_;
  double tol_;
  bool nonnegative_, normalized_;
  ScalarType dtype_, accumulator_;
};

std::tuple<Tensor, Tensor, Tensor> matching_pursuit(const Tensor& x, const Tensor& dictionary, int64_t k, double tol,
                                                    bool nonnegative, bool normalized, int64_t method) {
  InFloatMode mode(Subnormals::kept);
  auto chosen = option_of<Method>("matching_pursuit", "method", method, kMethods);
  return Pursuit(x, dictionary, k, tol, nonnegative, normalized).run(chosen);
}

}  // namespace

FASTSPARSE_REGISTER(fastsparse, CPU, matching_pursuit)

}  // namespace fastsparse::edge
