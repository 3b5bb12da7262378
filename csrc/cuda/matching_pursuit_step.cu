#include <algorithm>

#include "cuda/pursuit.h"

namespace fastsparse::cuda {

std::tuple<Tensor, Tensor, Tensor> matching_pursuit_step(const Tensor& residual, const Tensor& dictionary,
                                                         bool nonnegative, bool normalized) {
  return with_type(dtype_of(residual), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Pursuit<T> pursuit(residual, dictionary, std::nullopt, 0, nonnegative, normalized, false);
    for (int64_t n = 0, N = residual.size(0); n < N; n += pursuit.rows_at_a_time()) {
      pursuit.load(n, std::min(pursuit.rows_at_a_time(), N - n));
      pursuit.score();
      pursuit.take(0);
      pursuit.store();
    }
    return pursuit.result();
  });
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, matching_pursuit_step)

}  // namespace fastsparse::cuda
