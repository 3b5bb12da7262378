#include "cpu/sddmm.h"

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

Tensor sddmm(const Tensor& x, const Tensor& weight, const Tensor& indices) {
  InFloatMode mode(Subnormals::as_asked);
  int64_t N = indices.size(0), k = indices.size(1);
  Tensor codes = as_contiguous(indices, ScalarType::Long), rows = with_unit_stride(x), atoms = with_unit_stride(weight);
  check_indices("sddmm", codes, weight.size(0));
  Tensor out = allocate({N, k}, x.scalar_type());
  SddmmArgs args{rows.const_data_ptr(), atoms.const_data_ptr(), codes.const_data_ptr<int64_t>(),
                 out.mutable_data_ptr(), k, weight.size(1), rows.stride(0), atoms.stride(0), dtype_of(x)};
  parallel(N, rows_a_task(k * weight.size(1) * int64_t(weight.element_size())), FASTSPARSE_KERNEL(sddmm), args);
  return out;
}

FASTSPARSE_REGISTER(fastsparse, CPU, sddmm)

}  // namespace fastsparse::edge
