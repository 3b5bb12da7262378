#include "cuda/linear_recurrence.cuh"

#include "cuda/scan.h"

namespace fastsparse::cuda {

Tensor linear_recurrence(const Tensor& a, const Tensor& b, const std::optional<Tensor>& h0, bool reverse,
                         const std::optional<Tensor>& cu_seqlens) {
  Call call(b);
  ScalarType dtype = b.scalar_type();
  const bool pairs = b.dim() == 4;
  const int64_t B = b.size(0), T = b.size(1), H = b.size(-1);
  Tensor h = pairs ? allocate(b, {B, T, 2, H}, dtype) : allocate(b, {B, T, H}, dtype);
  if (h.numel() == 0) return h;
  Tensor factors = as_contiguous(a, dtype), terms = as_contiguous(b, dtype);
  std::optional<Tensor> start, bounds = contiguous_bounds(cu_seqlens);
  if (h0) start = as_contiguous(*h0, dtype);
  auto run = [&]<typename E, int States>() {
    using Steps = LinearSteps<E, States>;
    Steps steps{data<E>(factors), data<E>(terms), start ? data<E>(*start) : nullptr, mutable_data<E>(h)};
    ScanPlan<Steps>(call, Batch(B, T, H, bounds), reverse).run(call, "linear_recurrence", steps, b);
  };
  with_type(dtype_of(b), [&](auto tag) {
    using E = typename decltype(tag)::type;
    if (pairs) run.template operator()<E, 2>();
    else run.template operator()<E, 1>();
  });
  return h;
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, linear_recurrence)

}  // namespace fastsparse::cuda
