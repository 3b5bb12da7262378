#include "cpu/edge/dictionary.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "cpu/edge/product.h"
#include "gram.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kLine = 64;            // bytes: rows of the Gram matrix begin cache lines
constexpr int64_t kStripeAtoms = 384;    // multiplied at a time: fewer pack the dictionary more often, more waste more
                                         // of the square on the diagonal, of which half is needed

std::mutex mutex;
std::shared_ptr<PreparedDictionary> kept;  // under the mutex; what others hold too isn't written to

int64_t element_bytes(ScalarType accumulator) { return accumulator == ScalarType::Double ? 8 : 4; }

const char* row(const Tensor& tensor, int64_t m) {
  return static_cast<const char*>(tensor.const_data_ptr()) + m * tensor.stride(0) * int64_t(tensor.element_size());
}

}  // namespace

bool PreparedDictionary::holds(const Tensor& dictionary, bool normalized) const {
  if (M_ != dictionary.size(0) || D_ != dictionary.size(1) || dtype_ != dictionary.scalar_type() ||
      normalized_ != normalized)
    return false;
  size_t bytes = size_t(D_) * dictionary.element_size();
  auto* copy = static_cast<const char*>(copy_.data());
  std::atomic<bool> same{true};
  parallel(M_, rows_a_task(2 * int64_t(bytes)), [&](int64_t begin, int64_t end) {
    if (!same.load(std::memory_order_relaxed)) return;
    for (int64_t m = begin; m < end; ++m)
      if (std::memcmp(row(dictionary, m), copy + m * bytes, bytes)) {
        same.store(false, std::memory_order_relaxed);
        return;
      }
  });
  return same;
}

void PreparedDictionary::prepare(const Tensor& dictionary, bool normalized) {
  M_ = -1;  // nothing, should memory run out on the way
  int64_t M = dictionary.size(0);
  D_ = dictionary.size(1);
  dtype_ = dictionary.scalar_type();
  normalized_ = normalized;
  ScalarType accumulator = accumulator_of(dtype_);
  int64_t bytes = element_bytes(accumulator);
  bool copied = normalized && dtype_ == accumulator;  // and what is scored is the copy
  PrepareArgs args{row(dictionary, 0), dictionary.stride(0), D_, dtype_of(dictionary), normalized,
                   copy_.get<char>(M * D_ * int64_t(dictionary.element_size())),
                   copied ? nullptr : scored_.get<char>(M * D_ * bytes), squares_.get<double>(M),
                   norms_.get<char>(M * bytes)};
  parallel(M, 16, [&, run = FASTSPARSE_KERNEL(matching_pursuit_prepare)](int64_t b, int64_t e) { run(args, b, e); });
  M_ = M;
  measure();
  if (bounded_) multiply();
}

void PreparedDictionary::measure() {
  auto* squares = static_cast<const double*>(squares_.data());
  double largest = 0, smallest = 1;
  bool regular = true;
  for (int64_t m = 0; m < M_; ++m) {
    regular &= squares[m] == 0 || (squares[m] > 1e-280 && squares[m] < std::numeric_limits<double>::infinity());
    largest = std::max(largest, squares[m]);
    if (squares[m] > 0) smallest = std::min(smallest, squares[m]);
  }
  sizes_.largest_raw = std::sqrt(largest) * 1.0001;
  sizes_.largest = normalized_ ? sizes_.largest_raw : 1.0001;
  sizes_.smallest = normalized_ ? 1 : std::sqrt(smallest);
  bounded_ = regular && sizes_.largest < 1.4;
}

Tensor PreparedDictionary::scored() const {
  ScalarType accumulator = accumulator_of(dtype_);
  return over(normalized_ && dtype_ == accumulator ? copy_.data() : scored_.data(), M_, D_, D_, accumulator);
}

// Stripes of the upper triangle by the library, each written as it is and mirrored while it is in the cache.
void PreparedDictionary::multiply() {
  ScalarType accumulator = accumulator_of(dtype_);
  int64_t bytes = element_bytes(accumulator), lanes = kLine / bytes;
  stride_ = (M_ + lanes - 1) / lanes * lanes;
  if (gram_.bytes() / 2 > size_t(M_ * stride_ * bytes)) gram_ = Scratch();  // of a larger one
  char* gram = gram_.get<char>(M_ * stride_ * bytes);
  for (int64_t m = 0; stride_ > M_ && m < M_; ++m)
    std::memset(gram + (m * stride_ + M_) * bytes, 0, (stride_ - M_) * bytes);
  Tensor atoms = scored();
  Scratch scores;
  for (int64_t begin = 0; begin < M_; begin += kStripeAtoms) {
    int64_t count = std::min(kStripeAtoms, M_ - begin), width = M_ - begin;
    auto from_begin = [&](int64_t rows) {
      return over(static_cast<const char*>(atoms.const_data_ptr()) + begin * D_ * bytes, rows, D_, D_, accumulator);
    };
    Tensor stripe = product(from_begin(count), from_begin(width),
                            over(scores.get<char>(count * width * bytes), count, width, width, accumulator));
    SpreadArgs args{stripe.const_data_ptr(), begin, count, M_, stride_, gram, bytes == 8 ? DType::f64 : DType::f32};
    parallel(width, 256,
             [&, run = FASTSPARSE_KERNEL(matching_pursuit_spread)](int64_t b, int64_t e) { run(args, b, e); });
  }
}

std::shared_ptr<const PreparedDictionary> kept_dictionary(const Tensor& dictionary, bool normalized) {
  std::shared_ptr<PreparedDictionary> candidate;
  {
    std::lock_guard<std::mutex> lock(mutex);
    candidate = kept;
  }
  return candidate && candidate->holds(dictionary, normalized) ? candidate : nullptr;
}

std::shared_ptr<const PreparedDictionary> prepared_dictionary(const Tensor& dictionary, bool normalized) {
  bool keeps = gram_fits(dictionary.size(0), element_bytes(accumulator_of(dictionary.scalar_type())));
  std::shared_ptr<PreparedDictionary> mine;
  if (keeps) {
    std::lock_guard<std::mutex> lock(mutex);
    if (kept.use_count() == 1) mine = std::move(kept);  // nobody else reads it: its memory serves again
  }
  if (!mine) mine = std::make_shared<PreparedDictionary>();
  mine->prepare(dictionary, normalized);
  if (keeps) {
    std::lock_guard<std::mutex> lock(mutex);
    kept = mine;
  }
  return mine;
}

}  // namespace fastsparse::edge
