// What matching pursuit and one step of it do on the host.
#pragma once

#include <optional>
#include <tuple>

#include "cuda/edge.h"
#include "cuda/pursuit.cuh"

namespace fastsparse::cuda {

// The largest D of which a Gram matrix by tensor cores will do: their errors, which grow with D and with every step,
// must leave few candidates. Beyond it is fp32's, at a fifth of the rate, by both's peaks, of products of steps.
inline constexpr int64_t kDeepestGram = 2048;

// A call for tensors of one type, row block by row block: load, score, take steps, store.
template <typename T> class Pursuit {
  using C = Accumulator<T>;

 public:
  // Values and indices, (N, k) or, without k, of one step (N), and residuals are allocated here. `by_gram`: for the Gram
  // matrix and first scores, not for fresh scores in every step.
  Pursuit(const Tensor& x, const Tensor& dictionary, std::optional<int64_t> k, double tol, bool nonnegative,
          bool normalized, bool by_gram);

  // The Gram matrix (latents, latents) of the atoms' directions.
  Tensor gram() const;
  int64_t rows_at_a_time() const { return block_; }
  // Makes [begin, begin + rows) the block: its residuals are the tokens.
  void load(int64_t begin, int64_t rows);
  // The block's residuals times the atoms' directions.
  void score();
  // Step t of every row that goes on, by fresh scores.
  void take(int64_t t);
  // Rounds the residuals.
  void store();

  const Call& call() const { return call_; }
  const Atoms<T>& atoms() const { return atoms_; }
  const Work<C>& work() const { return work_; }
  const Goal<T>& goal() const { return goal_; }
  int64_t rows() const { return rows_; }
  int64_t threads() const;
  std::tuple<Tensor, Tensor, Tensor> result() const { return {values_, indices_, residual_}; }

 private:
  bool splits(bool by_gram) const;
  Tensor block_of(const Tensor& scratch, int64_t columns) const;

  Call call_;
  Tensor x_, dictionary_, values_, indices_, residual_, squares_, longest_, residuals_, scores_, steps_;
  Tensor directions_, left_directions_, left_residuals_;  // of products; the left ones where operands are split
  bool split_ = false;
  int64_t N_, D_, M_, k_, block_ = 0, begin_ = 0, rows_ = 0;
  Atoms<T> atoms_{};
  Work<C> work_{};
  Goal<T> goal_{};
};

}  // namespace fastsparse::cuda
