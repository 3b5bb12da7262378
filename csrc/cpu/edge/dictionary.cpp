#include "cpu/edge/dictionary.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "cpu/edge/knobs.h"
#include "cpu/edge/product.h"
#include "gram.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kLine = 64;          // bytes: rows of the Gram matrix begin cache lines
constexpr int64_t kStripeAtoms = 512;  // multiplied at a time: fewer pack the dictionary more often, more waste more of
                                       // the square on the diagonal, of which half is needed

std::mutex mutex;                          // of both:
std::shared_ptr<PreparedDictionary> kept;  // what others hold too isn't written to
struct {
  uint64_t fingerprint = 0;
  double forgone = 0;
} last_direct;

int64_t element_bytes(ScalarType accumulator) { return accumulator == ScalarType::Double ? 8 : 4; }

const char* row(const Tensor& tensor, int64_t m) {
  return static_cast<const char*>(tensor.const_data_ptr()) + m * tensor.stride(0) * int64_t(tensor.element_size());
}

}  // namespace

AtomSizes sizes_of(const double* squares, int64_t M, bool normalized) {
  double largest = 0, smallest = 1;
  bool regular = true;
  for (int64_t m = 0; m < M; ++m) {
    regular &= squares[m] == 0 || (squares[m] > 1e-280 && squares[m] < std::numeric_limits<double>::infinity());
    largest = std::max(largest, squares[m]);
    if (squares[m] > 0) smallest = std::min(smallest, squares[m]);
  }
  double raw = std::sqrt(largest) * 1.0001;
  return {.largest = normalized ? raw : 1.0001, .largest_raw = raw, .smallest = normalized ? 1 : std::sqrt(smallest),
          .regular = regular};
}

bool PreparedDictionary::holds(const Tensor& dictionary, bool normalized) const {
  if (M_ != dictionary.size(0) || D_ != dictionary.size(1) || dtype_ != dictionary.scalar_type() ||
      normalized_ != normalized || level_ != current_isa())
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

bool PreparedDictionary::fits() const { return gram_fits(M_, element_bytes(accumulator_of(dtype_))); }

void PreparedDictionary::prepare(const Tensor& dictionary, bool normalized) {
  M_ = -1;  // nothing, should memory run out on the way
  int64_t M = dictionary.size(0);
  D_ = dictionary.size(1);
  dtype_ = dictionary.scalar_type();
  normalized_ = normalized;
  level_ = current_isa();
  ScalarType accumulator = accumulator_of(dtype_);
  int64_t bytes = element_bytes(accumulator);
  bool copied = normalized && dtype_ == accumulator;  // and what is scored is the copy
  PrepareArgs args{row(dictionary, 0), dictionary.stride(0), D_, dtype_of(dictionary), normalized,
                   copy_.get<char>(M * D_ * int64_t(dictionary.element_size())),
                   copied ? nullptr : scored_.get<char>(M * D_ * bytes), squares_.get<double>(M),
                   inverse_.get<double>(M)};
  parallel(M, 16, FASTSPARSE_KERNEL(matching_pursuit_prepare), args);
  M_ = M;
  sizes_ = sizes_of(args.squares, M, normalized);
  bounded_ = sizes_.regular && sizes_.largest < kLargestPromised;
  if (bounded_) multiply();
}

AtomNorms PreparedDictionary::norms() const {
  if (normalized_) return {};
  return {static_cast<const double*>(squares_.data()), static_cast<const double*>(inverse_.data())};
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
    parallel(width, 256, FASTSPARSE_KERNEL(matching_pursuit_spread), args);
  }
}

namespace {

// A number that is another one for another dictionary, almost always.
uint64_t fingerprint(const Tensor& dictionary, bool normalized) {
  int64_t M = dictionary.size(0), D = dictionary.size(1);
  size_t bytes = size_t(D) * dictionary.element_size();
  auto mix = [](uint64_t value) {
    value *= 0x9e3779b97f4a7c15;
    return value ^ value >> 32;
  };
  std::atomic<uint64_t> total{mix(uint64_t(M) << 3 | uint64_t(dictionary.scalar_type()) << 1 | uint64_t(normalized))};
  parallel(M, rows_a_task(int64_t(bytes)), [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t m = begin; m < end; ++m) {
      const char* from = row(dictionary, m);
      uint64_t lanes[4] = {uint64_t(m), 1, 2, 3}, words[4];
      for (size_t left = bytes; left > 0;) {
        size_t part = std::min(left, sizeof words);
        if (part < sizeof words) std::memset(words, 0, sizeof words);
        std::memcpy(words, from, part);
        for (int i = 0; i < 4; ++i) lanes[i] = mix(lanes[i] ^ words[i]);
        from += part;
        left -= part;
      }
      sum += mix(lanes[0] + mix(lanes[1] + mix(lanes[2] + mix(lanes[3]))));
    }
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total;
}

}  // namespace

bool gram_is_due(const Tensor& dictionary, bool normalized, double gain, double price) {
  uint64_t seen = fingerprint(dictionary, normalized);
  std::lock_guard<std::mutex> lock(mutex);
  if (last_direct.fingerprint != seen) last_direct = {seen, 0};
  last_direct.forgone += gain;
  return last_direct.forgone >= price;
}

namespace {
void keep(std::shared_ptr<PreparedDictionary> dictionary) {
  knobs.kept_atoms = dictionary ? dictionary->count() : 0;
  kept = std::move(dictionary);
}
}  // namespace

std::shared_ptr<const PreparedDictionary> kept_dictionary(const Tensor& dictionary, bool normalized) {
  std::shared_ptr<PreparedDictionary> candidate;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (kept && !kept->fits()) keep(nullptr);  // the limit is a lower one by now
    candidate = kept;
  }
  return candidate && candidate->holds(dictionary, normalized) ? candidate : nullptr;
}

std::shared_ptr<const PreparedDictionary> prepared_dictionary(const Tensor& dictionary, bool normalized) {
  bool keeps = gram_fits(dictionary.size(0), element_bytes(accumulator_of(dictionary.scalar_type())));
  std::shared_ptr<PreparedDictionary> mine;
  if (keeps) {
    std::lock_guard<std::mutex> lock(mutex);
    if (kept.use_count() == 1) {  // nobody else reads it any more: its memory serves again
      std::atomic_thread_fence(std::memory_order_acquire);
      mine = kept;
      keep(nullptr);
    }
  }
  if (!mine) mine = std::make_shared<PreparedDictionary>();
  mine->prepare(dictionary, normalized);
  if (keeps) {
    std::lock_guard<std::mutex> lock(mutex);
    keep(mine);
  }
  return mine;
}

}  // namespace fastsparse::edge
