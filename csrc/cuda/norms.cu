#include "cuda/norms.h"

#include "cuda/norms.cuh"
#include "cuda/rows.h"

namespace fastsparse::cuda {

Tensor squared_norms(const Call& call, const Tensor& rows) {
  int64_t M = rows.size(0), D = rows.size(1);
  Tensor squares = allocate(rows, {M}, ScalarType::Double);
  unsigned blocks = unsigned((M + kNormThreads / kWarp - 1) / (kNormThreads / kWarp));
  with_type(dtype_of(rows), [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto kernel = takes_packets<T>(rows, D) ? rows_squared_norms<T, Packet<T>::size> : rows_squared_norms<T, 1>;
    call.launch("rows_squared_norms", kernel, blocks, kNormThreads, 0, data<T>(rows), mutable_data<double>(squares), M,
                D, rows.stride(0));
  });
  return squares;
}

}  // namespace fastsparse::cuda
