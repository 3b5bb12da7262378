// Dictionaries made ready for matching pursuit by their Gram matrix, one of which is kept from call to call.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/edge/edge.h"
#include "cpu/matching_pursuit.h"

namespace fastsparse::edge {

// The largest norm that an atom may have where norm 1 was promised, for scores that are tracked or ruled out by bounds.
inline constexpr double kLargestPromised = 1.4;

// Of M atoms, from the squares of their norms.
AtomSizes sizes_of(const double* squares, int64_t M, bool normalized);

// A dictionary (M, D): its copy, and what is made of it.
class PreparedDictionary {
 public:
  const void* atoms() const { return copy_.data(); }  // (M, D) of its dtype
  AtomNorms norms() const;
  // Whether its Gram matrix was made: scores can be tracked where all atoms are finite and, if they are promised to be
  // of norm 1, at least so near to it that a step is no larger than the row.
  bool bounded() const { return bounded_; }
  const AtomSizes& sizes() const { return sizes_; }
  const void* gram() const { return gram_.data(); }  // (M, M) of the accumulation type
  int64_t gram_stride() const { return stride_; }
  Tensor scored() const;  // (M, D) of the accumulation type: what a product with rows scores

  int64_t count() const { return M_; }
  bool fits() const;  // its Gram matrix is within gram_limit()

 private:
  friend std::shared_ptr<const PreparedDictionary> kept_dictionary(const Tensor&, bool);
  friend std::shared_ptr<const PreparedDictionary> prepared_dictionary(const Tensor&, bool);
  bool holds(const Tensor& dictionary, bool normalized) const;
  void prepare(const Tensor& dictionary, bool normalized);
  void multiply();

  ScalarType dtype_ = ScalarType::Float;
  Isa level_ = Isa::baseline;  // which sums the norms in its own order
  bool normalized_ = false, bounded_ = false;
  int64_t M_ = -1, D_ = -1, stride_ = 0;
  AtomSizes sizes_;
  Scratch copy_, scored_, squares_, inverse_, gram_;
};

// Both take a dictionary with unit stride along its rows.

// What was prepared of this very dictionary, if it is kept; else null. All of it is compared with the copy: that takes
// as long as reading both, and can't mistake one for another, as a hash or a version counter can.
std::shared_ptr<const PreparedDictionary> kept_dictionary(const Tensor& dictionary, bool normalized);

// The dictionary prepared anew, and kept in the place of what was, in the same memory, if its Gram matrix is within
// gram_limit(). A dictionary that changes with every call pays for that with its copy alone.
std::shared_ptr<const PreparedDictionary> prepared_dictionary(const Tensor& dictionary, bool normalized);

// Whether it is time to make a Gram matrix that a single call doesn't pay for: calls in a row with one dictionary, each
// of which it would have made cheaper by `gain`, have come to its `price`. So a dictionary that changes pays for none,
// and one that doesn't for its own, having lost no more than that before.
bool gram_is_due(const Tensor& dictionary, bool normalized, double gain, double price);

}  // namespace fastsparse::edge
