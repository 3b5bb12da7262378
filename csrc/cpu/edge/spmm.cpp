#include "cpu/spmm.h"

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

Tensor spmm(const Tensor& values, const Tensor& indices, const Tensor& weight) {
  int64_t N = indices.size(0), k = indices.size(1), D = weight.size(1);
  Tensor codes = torch::stable::contiguous(indices), atoms = with_unit_stride(weight);
  check_indices("spmm", codes, weight.size(0));
  Tensor coefficients =
      torch::stable::contiguous(torch::stable::to(values, accumulator_of(weight.scalar_type())));
  Tensor out = allocate({N, D}, weight.scalar_type());
  SpmmArgs args{coefficients.const_data_ptr(), codes.const_data_ptr<int64_t>(), atoms.const_data_ptr(),
                out.mutable_data_ptr(), k, D, atoms.stride(0), dtype_of(weight)};
  parallel(N, 8, [&, run = FASTSPARSE_KERNEL(spmm)](int64_t begin, int64_t end) { run(args, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) { m.impl("spmm", TORCH_BOX(&spmm)); }

}  // namespace fastsparse::edge
