#include "cuda/matching_pursuit.cuh"

#include <algorithm>

#include "cuda/knobs.h"
#include "cuda/pursuit.h"
#include "cuda/rows.h"
#include "gram.h"

namespace fastsparse::cuda {

namespace {

template <typename T> void direct(Pursuit<T>& pursuit, int64_t N, int64_t k) {
  for (int64_t n = 0; n < N; n += pursuit.rows_at_a_time()) {
    pursuit.load(n, std::min(pursuit.rows_at_a_time(), N - n));
    for (int64_t t = 0; t < k; ++t) {
      pursuit.score();
      pursuit.take(t);
    }
    pursuit.store();
  }
}

template <typename T> void gram(Pursuit<T>& pursuit, int64_t N) {
  using C = Accumulator<T>;
  const Call& call = pursuit.call();
  Tensor matrix = pursuit.gram();
  int64_t latents = matrix.size(0);
  int64_t bytes = (latents + int64_t{pursuit.work().depth}) * int64_t(sizeof(C));
  bool resident = bytes <= (knobs.shared_bytes ? knobs.shared_bytes : call.most_shared_bytes());
  for (int64_t n = 0; n < N; n += pursuit.rows_at_a_time()) {
    pursuit.load(n, std::min(pursuit.rows_at_a_time(), N - n));
    pursuit.score();
    auto kernel = resident ? matching_pursuit_follow<T, true> : matching_pursuit_follow<T, false>;
    call.launch("matching_pursuit_follow", kernel, pursuit.rows(), pursuit.threads(), resident ? bytes : 0,
                pursuit.atoms(), pursuit.goal(), pursuit.work(), data<C>(matrix));
    pursuit.store();
  }
}

// Whether to use the Gram matrix; under "auto" where it pays, by shapes alone: one product for M rows for k - 1 for N.
// A single step has no use for it.
template <typename T>
bool takes_gram(Method method, int64_t N, int64_t M, int64_t D, int64_t k) {
  using C = Accumulator<T>;
  if (N == 0 || k == 1 || method == Method::direct) return false;
  int64_t price = sizeof(C) == 4 && D > kDeepestGram ? 5 : 1;
  return method == Method::gram || (price * M < N * (k - 1) && gram_fits(M, sizeof(C)));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> matching_pursuit(const Tensor& x, const Tensor& dictionary, int64_t k, double tol,
                                                    bool nonnegative, bool normalized, int64_t method) {
  auto chosen = option_of<Method>("matching_pursuit", "method", method, kMethods);
  return with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    int64_t N = x.size(0), M = dictionary.size(0);
    bool by_gram = takes_gram<T>(chosen, N, M, x.size(1), k);
    Pursuit<T> pursuit(x, dictionary, k, tol, nonnegative, normalized, by_gram);
    if (by_gram) gram(pursuit, N);
    else direct(pursuit, N, k);
    return pursuit.result();
  });
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, matching_pursuit)

}  // namespace fastsparse::cuda
