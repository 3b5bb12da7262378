#include "cuda/linear_recurrence_backward.cuh"

#include "cuda/scan.h"

namespace fastsparse::cuda {

std::tuple<Tensor, Tensor, Tensor> linear_recurrence_backward(const Tensor& a, const std::optional<Tensor>& h0,
                                                              bool reverse, const std::optional<Tensor>& cu_seqlens,
                                                              const Tensor& h, const Tensor& d_h, bool needs_a,
                                                              bool needs_b, bool needs_h0) {
  Call call(h);
  const ScalarType dtype = h.scalar_type();
  const bool pairs = h.dim() == 4;
  const int64_t B = h.size(0), T = h.size(1), H = h.size(-1);
  std::optional<Tensor> start, bounds = contiguous_bounds(cu_seqlens);
  const Batch batch(B, T, H, bounds);
  auto output = [&](bool needed, std::initializer_list<int64_t> of_channels, std::initializer_list<int64_t> of_pairs) {
    return needed ? allocate(h, pairs ? of_pairs : of_channels, dtype) : allocate(h, {0}, dtype);
  };
  Tensor d_a = output(needs_a, {B, T, H}, {B, T, 2, 2, H}), d_b = output(needs_b, {B, T, H}, {B, T, 2, H});
  Tensor d_h0 = output(needs_h0, {batch.S, H}, {batch.S, 2, H});
  if (!needs_a && !needs_b && !needs_h0) return {d_a, d_b, d_h0};

  Tensor factors = as_contiguous(a, dtype), states = as_contiguous(h, dtype), upstream = as_contiguous(d_h, dtype);
  if (h0) start = as_contiguous(*h0, dtype);
  auto run = [&]<typename E, int States>() {
    using Steps = LinearBackSteps<E, States>;
    auto where = [](bool needed, const Tensor& tensor) { return needed ? mutable_data<E>(tensor) : nullptr; };
    Steps steps{data<E>(factors),  start ? data<E>(*start) : nullptr, data<E>(states),
                data<E>(upstream), where(needs_a, d_a),               where(needs_b, d_b),
                where(needs_h0, d_h0)};
    ScanPlan<Steps>(call, batch, !reverse).run(call, "linear_recurrence_backward", steps, h);
  };
  with_type(dtype_of(h), [&](auto tag) {
    using E = typename decltype(tag)::type;
    if (pairs) run.template operator()<E, 2>();
    else run.template operator()<E, 1>();
  });
  return {d_a, d_b, d_h0};
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, linear_recurrence_backward)

}  // namespace fastsparse::cuda
